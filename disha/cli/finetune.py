"""``disha finetune``: fine-tune a model with adapters."""

from __future__ import annotations

from collections.abc import Sequence

from disha.cli.config_file import arguments_in
from disha.cli.exit_codes import FAILED
from disha.cli.flags import parsed
from disha.finetune.command import finetune
from disha.finetune.errors import PeerError
from disha.finetune.settings import DEMO_SETTINGS, FinetuneSettings

__all__ = ["run", "settings_from"]

DESCRIPTION = """Fine-tune a model with Bone or BAT adapters.

examples:
  disha finetune --demo
  disha finetune --base_model_name_or_path path/to/model --data_path rows.jsonl --output_dir out
  disha finetune --config run.yaml --learning_rate 1e-4"""


def run(arguments: Sequence[str]) -> None:
    """Fine-tune, as command-line `arguments` say."""
    settings = settings_from(arguments)
    try:
        finetune(settings)
    except PeerError as error:
        # Of several processes, the one that failed has said why.
        raise SystemExit(FAILED) from error


def settings_from(arguments: Sequence[str]) -> FinetuneSettings:
    """The settings that command-line `arguments` give.

    Raises:
        SystemExit: the arguments are not understood, or ask for help.
    """
    words = list(arguments)
    given = _parsed(words, FinetuneSettings())
    if given.config is not None:
        # What is given twice counts as it was given last.
        words = [*arguments_in(given.config, given.to_json()), *words]
        given = _parsed(words, FinetuneSettings())
    return _parsed(words, DEMO_SETTINGS) if given.demo else given


def _parsed(words: Sequence[str], default: FinetuneSettings) -> FinetuneSettings:
    return parsed(FinetuneSettings, "finetune", words, DESCRIPTION, default)
