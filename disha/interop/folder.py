"""Adapters in PEFT's folder layout: `adapter_config.json` beside `adapter_model.safetensors`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from disha.errors import AdapterFileError
from disha.files import atomic
from disha.files.atomic import PathLike, checked_path
from disha.files.json_files import read_json
from disha.files.pieces import tensor_writer
from disha.files.tensors import opened
from disha.interop.targets import exact_regex

__all__ = [
    "CONFIG_NAME",
    "PREFIX",
    "WEIGHTS_NAME",
    "anchored",
    "read_folder",
    "target_modules",
    "write_folder",
]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

PREFIX = "base_model.model."
"""What PEFT has before every name: its wrapper, and the model in it."""


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter's folder, or nothing.

    Args:
        folder: made if it is not there.
        config: what becomes `adapter_config.json`.
        tensors: key without `PREFIX` -> contiguous tensor on the CPU.

    Raises:
        AdapterIOError: it can't be written; what was there is still there.
    """
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"

    def write_config(path: str) -> None:
        Path(path).write_text(text, encoding="utf-8")

    prefixed = {PREFIX + key: tensor for key, tensor in tensors.items()}
    write_tensors = tensor_writer(prefixed, {"format": "pt"})
    # PEFT looks for the configuration first, so it comes last.
    files = {WEIGHTS_NAME: write_tensors, CONFIG_NAME: write_config}
    if folder.is_dir():
        atomic.write_files({folder / name: write for name, write in files.items()})
        return
    with atomic.write_folder(folder) as new:
        for name, write in files.items():
            write(str(new / name))


def read_folder(folder: PathLike) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """Return the path of an adapter's folder, its configuration, and its tensors without `PREFIX`.

    The tensors may have any dtype: modules that are saved whole have buffers.

    Raises:
        AdapterIOError: it can't be read.
        AdapterFileError: it holds no adapter in PEFT's layout.
    """
    path = checked_path(folder)
    config = read_json(path / CONFIG_NAME)
    weights = path / WEIGHTS_NAME
    with opened(weights) as file:
        foreign = [key for key in file.keys if not key.startswith(PREFIX)]
        if foreign:
            raise AdapterFileError(
                f"{weights}: tensor {foreign[0]!r} does not begin with {PREFIX!r}, as PEFT's do"
            )
        for key in file.keys:
            file.shape(key)  # one that torch can work on
        return path, config, {key.removeprefix(PREFIX): file.read(key) for key in file.keys}


def anchored(name: str) -> str:
    """Return the regex that PEFT's patterns find in this name only.

    PEFT matches a pattern with the end of a name, after any dot, unless it asks for the beginning.
    """
    return "^" + re.escape(name)


def target_modules(names: Iterable[str], modules: Iterable[str] | None) -> list[str] | str:
    """Return what makes PEFT target these modules and no others.

    A list matches the ends of names too: the last parts of the names where these select no more,
    or else whole names, or else a regex, which is also what an unknown model gets.

    Args:
        names: the modules to target.
        modules: the names of all modules of the model, if known.
    """
    wanted = set(names)
    if modules is None:
        return exact_regex(wanted)
    known = set(modules)
    for ends in (sorted({name.rpartition(".")[2] for name in wanted}), sorted(wanted)):
        longer = tuple(f".{end}" for end in ends)
        if {name for name in known if name in ends or name.endswith(longer)} == wanted:
            return ends
    return exact_regex(wanted)
