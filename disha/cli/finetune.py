"""``disha finetune``: fine-tune a model with adapters."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from disha.cli.dispatcher import FAILED
from disha.cli.flags import parsed
from disha.errors import ArgumentError
from disha.finetune.errors import PeerError
from disha.finetune.settings import DEMO_SETTINGS, FinetuneSettings

__all__ = ["run", "settings_from"]

DESCRIPTION = """Fine-tune a model with Bone or BAT adapters.

examples:
  disha finetune --demo
  disha finetune --base_model_name_or_path path/to/model --data_path rows.jsonl --output_dir out
  disha finetune --config run.yaml --learning_rate 1e-4"""


def run(arguments: Sequence[str]) -> None:
    """Fine-tune, with the given command-line arguments."""
    settings = settings_from(arguments)
    # These take seconds to import, and the help does not need them.
    from torch.distributed.elastic.multiprocessing.errors import record

    from disha.finetune.command import finetune

    # A recorded error appears in the summary of torchrun.
    in_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    try:
        (record(finetune) if in_torchrun else finetune)(settings)
    except PeerError as error:
        # The process that failed has printed the reason.
        raise SystemExit(FAILED) from error


def settings_from(arguments: Sequence[str]) -> FinetuneSettings:
    """Return the settings of command-line `arguments`, which replace those of a config file.

    Raises:
        SystemExit: the arguments are invalid, or ask for help.
        ArgumentError: the config file can't be used.
    """
    words = list(arguments)
    given = _parsed(words, FinetuneSettings())
    if given.config is not None:
        # If a flag is given twice, the last value counts.
        words = [*_words_in(given.config, given.to_json().keys() - {"config"}), *words]
        given = _parsed(words, FinetuneSettings())
    return _parsed(words, DEMO_SETTINGS) if given.demo else given


def _parsed(words: Sequence[str], defaults: FinetuneSettings) -> FinetuneSettings:
    return parsed(FinetuneSettings, "finetune", words, DESCRIPTION, defaults)


# --- the config file -----------------------------------------------------------------------------


def _words_in(path: Path, known: Collection[str]) -> list[str]:
    """Return the flags in a YAML or TOML file as words of a command line."""
    words: list[str] = []
    for key, value in _contents(path).items():
        name = str(key).replace("-", "_")
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ArgumentError(f"--config {path} holds {name!r}, which is not a flag{hint}")
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(one, (str, int, float, bool, type(None))) for one in values):
            raise ArgumentError(
                f"--config {path}: {name} must be a text, a number, true or false, or a list of "
                f"these, got {value!r}"
            )
        if value is not None:
            words += [f"--{name}", *map(str, values)]
    return words


def _contents(path: Path) -> Mapping[Any, Any]:
    import yaml

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    suffix = path.suffix.lower()
    if suffix not in (".yaml", ".yml", ".toml"):
        raise ArgumentError(f"--config {path} must end with .yaml, .yml or .toml")
    try:
        text = path.read_text(encoding="utf-8")
        found = tomllib.loads(text) if suffix == ".toml" else yaml.safe_load(text) or {}
    except OSError as error:
        raise ArgumentError(f"--config {path} can't be read: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ArgumentError(f"--config {path} is not {suffix[1:].upper()}: {reason}") from error
    if not isinstance(found, Mapping):
        raise ArgumentError(
            f"--config {path} must hold flags by their names, as in `bone_r: 64`, got "
            f"{type(found).__name__}"
        )
    return found
