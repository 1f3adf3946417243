"""``disha finetune``: fine-tune a model with adapters."""

from __future__ import annotations

from collections.abc import Sequence

from disha.cli.flags import parsed
from disha.finetune.command import finetune
from disha.finetune.settings import DEMO_SETTINGS, FinetuneSettings

__all__ = ["run", "settings_from"]

DESCRIPTION = """Fine-tune a model with Bone or BAT adapters.

examples:
  disha finetune --demo
  disha finetune --base_model_name_or_path path/to/model --data_path rows.jsonl --output_dir out
  disha finetune --config run.yaml --learning_rate 1e-4"""


def run(arguments: Sequence[str]) -> None:
    """Fine-tune, as command-line `arguments` say."""
    finetune(settings_from(arguments))


def settings_from(arguments: Sequence[str]) -> FinetuneSettings:
    """The settings that command-line `arguments` give.

    Raises:
        SystemExit: the arguments are not understood, or ask for help.
    """
    # The flag itself must still be there to be given, so its default stays False.
    is_demo = "--demo" in arguments
    default = DEMO_SETTINGS.changed(demo=False) if is_demo else FinetuneSettings()
    return parsed(FinetuneSettings, "finetune", arguments, DESCRIPTION, default)
