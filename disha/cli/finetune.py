"""``disha finetune``: fine-tune a model with adapters."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from disha.cli.dispatcher import FAILED
from disha.cli.flags import parsed
from disha.cli.meanings import FLAG_WORDS, long_name, nearest
from disha.cli.noted import base_of
from disha.errors import ArgumentError
from disha.finetune.errors import OutputError, PeerError, TrainingError, raised_as
from disha.finetune.settings import DEMO_SETTINGS, FIRST, AdapterSettings, FinetuneSettings
from disha.text import brief

__all__ = ["run", "settings_from"]

LARGEST_CONFIG = 32 * 2**10
"""Largest size of a file of flags, in bytes. PyYAML needs about a second for that much."""

DESCRIPTION = """Fine-tune a model with a Bone, tile or BAT adapter.

examples:
  disha finetune --demo
  disha finetune --base path/to/model --data rows.jsonl --output out
  disha finetune --config run.yaml --lr 1e-4
  disha finetune --adapter out/adapter.safetensors --data more.jsonl --output more"""


def run(arguments: Sequence[str]) -> None:
    """Fine-tune, with the given command-line arguments."""
    settings = settings_from(arguments)
    # Under torchrun, `finetune` checks them once the processes have joined. Then one process
    # reports a mistake for all of them.
    if "RANK" not in os.environ:
        settings.check()
    # These take seconds to import. The help and errors about flags do not need them.
    from torch.distributed.elastic.multiprocessing.errors import record

    from disha.finetune.command import finetune

    # A recorded error appears in the summary of torchrun.
    in_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    try:
        (record(finetune) if in_torchrun else finetune)(settings)
    except PeerError as error:
        # The process that failed has printed the reason.
        raise SystemExit(FAILED) from error
    except OutputError as error:
        # The paths were checked at the start, so a later failure is not one of the input.
        raise TrainingError(str(error)) from error


def settings_from(arguments: Sequence[str]) -> FinetuneSettings:
    """Return the settings of command-line `arguments`, which replace those of a config file.

    Raises:
        SystemExit: the arguments ask for help.
        ArgumentError: the arguments are invalid, or the config file can't be used.
    """
    words = list(arguments)
    given = _parsed(words, FinetuneSettings())
    if given.config is not None:
        # If a flag is given twice, the last value counts.
        words = [*_words_in(given.config), *words]
        given = _parsed(words, FinetuneSettings())
    defaults = DEMO_SETTINGS if given.demo else FinetuneSettings()
    if given.adapter.adapter is not None:
        defaults = _going_on_from(given.adapter.adapter, defaults, given)
    return _parsed(words, defaults)


def _going_on_from(
    adapter: Path, defaults: FinetuneSettings, given: FinetuneSettings
) -> FinetuneSettings:
    """Return the defaults for training an adapter file further: its settings, and its base."""
    is_named = given.demo or given.model.is_named
    return replace(
        defaults,
        adapter=AdapterSettings.of_file(adapter),
        model=defaults.model if is_named else base_of(adapter) or defaults.model,
    )


def _parsed(words: Sequence[str], defaults: FinetuneSettings) -> FinetuneSettings:
    return parsed(FinetuneSettings, "finetune", words, DESCRIPTION, defaults, FIRST)


# --- the config file -----------------------------------------------------------------------------


def _words_in(path: Path) -> list[str]:
    """Return the flags in a YAML or TOML file as words of a command line."""
    words: list[str] = []
    known = FinetuneSettings().to_json()
    del known["config"]
    seen = set[str]()
    for key, value in _contents(path).items():
        name = long_name(key if isinstance(key, str) else brief(key), known)
        if name not in known:
            near = nearest(name, known, FLAG_WORDS)
            hint = "" if near is None else f"; did you mean {near}?"
            raise ArgumentError(f"--config {path} holds {name!r}, which is not a flag{hint}")
        if name in seen:
            raise ArgumentError(f"--config {path} holds {name} twice; leave one of them out")
        seen.add(name)
        values = value if isinstance(value, list) else [value]
        if not all(map(_is_plain, values)):
            raise ArgumentError(
                f"--config {path}: {name} must be a text, a number, true or false, or a list of "
                f"these, got {brief(value)}"
            )
        if value is values and len(values) != 1 and not isinstance(known[name], tuple):
            raise ArgumentError(
                f"--config {path}: {name} must be one value, got the list {brief(value)}"
            )
        if value is not None:
            said = list(map(_word, values))
            words += [f"--{name}", *said] if value is values else [f"--{name}={said[0]}"]
    return words


def _word(value: object) -> str:
    """Return a value as a word. PyYAML reads `no` as False, as in `save_strategy: no`."""
    return "no" if value is False else str(value)


def _is_plain(value: object) -> bool:
    if isinstance(value, int):
        return value.bit_length() <= 64
    return value is None or isinstance(value, (str, float))


def _contents(path: Path) -> Mapping[Any, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    from disha.files import read_text

    suffix = path.suffix.lower()
    if suffix not in (".yaml", ".yml", ".toml"):
        raise ArgumentError(f"--config {path} must end with .yaml, .yml or .toml")
    with raised_as(ArgumentError, "--config: "):
        text = read_text(path, LARGEST_CONFIG)
    try:
        found = tomllib.loads(text) if suffix == ".toml" else _yaml(text)
    except Exception as error:  # PyYAML raises nearly anything for a value of the wrong form
        reason = " ".join(str(error).split())
        raise ArgumentError(f"--config {path} is not {suffix[1:].upper()}: {reason}") from error
    if not isinstance(found, Mapping):
        raise ArgumentError(
            f"--config {path} must hold flags by their names, as in `bone_r: 64`, got "
            f"{type(found).__name__}"
        )
    return found


def _yaml(text: str) -> Any:
    """Read YAML. Raise if a key comes twice, which PyYAML accepts."""
    import yaml

    loader = yaml.SafeLoader(text)
    node = loader.get_single_node()
    if isinstance(node, yaml.MappingNode):
        keys = Counter(str(key.value) for key, _ in node.value)
        twice = next((key for key, count in keys.items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"{twice!r} comes twice")
    found = None if node is None else loader.construct_document(node)
    return {} if found is None else found
