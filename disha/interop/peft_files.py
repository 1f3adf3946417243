"""PEFT's folder of one adapter: `adapter_config.json` beside `adapter_model.safetensors`.

This module reads and writes the two files, and names layers so that PEFT finds them and no others.
`miss` and `lora_folder` know what the fields and tensors of each format mean.

The tensors say which layers are adapted. Regexes in a folder are never run: they come from
strangers, and `re` can take forever on some of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from disha.errors import AdapterFileError, AdapterIOError, ConversionError
from disha.files.atomic import (
    PathLike,
    checked_path,
    clear_drafts,
    write_files,
    write_folder,
)
from disha.files.json_files import is_size, read_json
from disha.files.pieces import tensor_writer
from disha.files.reading import found_at
from disha.files.tensors import DTYPES, opened
from disha.state import finite_as
from disha.text import brief, first_few

__all__ = [
    "CONFIG_NAME",
    "PREFIX",
    "Fields",
    "anchored",
    "exact_targets",
    "has_saved",
    "is_inside",
    "is_saved",
    "name_ends",
    "read_peft_files",
    "refuse_to_load",
    "unusable",
    "write_peft_files",
]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

PREFIX = "base_model.model."
"""PEFT's prefix of every name: its wrapper, and the model in it."""

LONGEST_NAME = 1_000
"""Limit on a tensor's name in characters."""

MOST_SAVED = 10_000
"""Limit on the number of entries in `modules_to_save`. Each is compared with many names."""

MOST_PARTS = 100
"""Most parts of a name in a regex. `_regex` calls itself for each part."""

SHOWN = 20
"""How many problems an error lists."""


# --- both files ----------------------------------------------------------------------------------


def write_peft_files(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write both files, or none.

    Args:
        folder: created if it does not exist.
        config: the content of `adapter_config.json`.
        tensors: key without `PREFIX` -> contiguous tensor on the CPU.

    Raises:
        AdapterIOError: a file can't be written; the old files are unchanged.
    """
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"

    def write_config(path: str) -> None:
        Path(path).write_text(text, encoding="utf-8")

    prefixed = {PREFIX + key: tensor for key, tensor in tensors.items()}
    write_tensors = tensor_writer(prefixed, {"format": "pt"})
    # PEFT looks for the configuration first, so it takes its place last.
    files = {WEIGHTS_NAME: write_tensors, CONFIG_NAME: write_config}
    if found_at(folder) == "folder":
        clear_drafts([folder])
        write_files({folder / name: write for name, write in files.items()})
        return
    with write_folder(folder) as new:
        for name, write in files.items():
            write(str(new / name))


def read_peft_files(folder: PathLike) -> tuple[Path, Fields, dict[str, Tensor]]:
    """Return the folder's path, its configuration, and its tensors without `PREFIX`.

    The tensors may have any dtype, because PEFT saves buffers of modules too.

    Raises:
        AdapterIOError: the folder can't be read.
        AdapterFileError: it does not hold an adapter in PEFT's layout.
    """
    path = checked_path(folder)
    if found_at(path) != "folder":
        raise AdapterIOError(f"can't read {path}: it is not a folder; name one with {CONFIG_NAME}")
    fields = Fields(path / CONFIG_NAME, read_json(path / CONFIG_NAME))
    if found_at(path / WEIGHTS_NAME) is None and found_at(path / "adapter_model.bin"):
        raise AdapterFileError(
            f"{path} has its tensors in adapter_model.bin, a pickle, which can run any code and is "
            "not read; load it in PEFT if you trust it, and save it again as safetensors"
        )
    tensors = {}
    with opened(path / WEIGHTS_NAME) as file:
        for key in file.tensors:
            name = key.removeprefix(PREFIX)
            if name in (key, ""):
                raise AdapterFileError(
                    f"{file.path}: the name of tensor {brief(key)} must be {PREFIX!r} and a name "
                    "in the model, as PEFT writes it; save the adapter again with PEFT"
                )
            if len(name) > LONGEST_NAME:
                raise AdapterFileError(
                    f"{file.path}: a tensor's name has {len(name):,} characters; allowed are "
                    f"{LONGEST_NAME:,}"
                )
            tensors[name] = file.read(key)
    return path, fields, tensors


class Fields:
    """The fields of an `adapter_config.json`, each checked when it is read.

    Args:
        path: the file, for errors.
        values: its content.
    """

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self.values = path, values
        self.read: set[str] = set()

    def get(self, field: str, default: Any = None) -> Any:
        """Return a field unchecked, or the default if it is absent."""
        self.read.add(field)
        return self.values.get(field, default)

    def wrong(self, field: str, allowed: str) -> AdapterFileError:
        """Return the error for a field."""
        found = brief(self.values.get(field))
        return AdapterFileError(f"{self.path}: {field} must be {allowed}; it is {found}")

    def size(self, field: str, default: int) -> int:
        """Return a field that must be a size."""
        value: int = self.get(field, default)
        if not is_size(value):
            raise self.wrong(field, "an integer of at least 1")
        return value

    def names(self, field: str) -> tuple[str, ...]:
        """Return a field that must be a list of names, or null."""
        value = self.get(field)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
            raise self.wrong(field, "a list of names, none of them empty, or null")
        return tuple(value)

    def modules_to_save(self) -> tuple[str, ...]:
        """Return the endings of the names of modules that are saved completely."""
        names = self.names("modules_to_save")
        if len(names) > MOST_SAVED:
            raise self.wrong("modules_to_save", f"a list of at most {MOST_SAVED:,} names")
        return names

    def refuse_unread(self, ignored: Iterable[str]) -> None:
        """Raise if a field is unknown (neither read nor ignored) and has a value."""
        unread = sorted(set(self.values) - self.read - set(ignored))
        meant = [field for field in unread if self.values[field] not in (None, False, "", [], {})]
        if meant:
            shown = first_few([f"{field}={brief(self.values[field])}" for field in meant], 10, ", ")
            raise AdapterFileError(
                f"{self.path} has unknown fields that may change what the adapter computes: "
                f"{shown}. Upgrade disha-torch, or set them to null if they have no effect"
            )


def unusable(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return a problem for each tensor that an adapter can't hold."""
    problems = []
    for name, value in tensors.items():
        if value.dtype not in DTYPES.values():
            problems.append(
                f"{name}: has dtype {value.dtype}; allowed are {', '.join(DTYPES)}. If it is a "
                "buffer of a saved module, load the folder into the model, or "
                "pass also_train=False"
            )
        elif not finite_as(value, value.dtype):
            problems.append(f"{name}: holds values that are not finite (NaN or infinity)")
    return problems


def refuse_to_load(path: Path, problems: Sequence[str], reader: str = "PEFT") -> None:
    """Raise `AdapterFileError` with all problems of a folder or a file, if there are any.

    Args:
        path: the folder or the file.
        problems: its problems.
        reader: what it is made for.
    """
    if problems:
        raise AdapterFileError(
            f"{path} can't be loaded with the same results as in {reader}; nothing changed:\n"
            + first_few(problems, SHOWN)
        )


# --- names ---------------------------------------------------------------------------------------


def name_ends(name: str) -> Iterable[str]:
    """Return the name, and the rest of it after each dot."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def is_saved(name: str, modules_to_save: Iterable[str]) -> bool:
    """Whether PEFT saves the module of that name: the name ends with an entry."""
    return name.endswith(tuple(modules_to_save))


def has_saved(name: str, modules_to_save: Iterable[str]) -> bool:
    """Whether a tensor of that name is in a module that PEFT saves, at any depth."""
    # "head." is in the name if the name of a module around the tensor ends with "head".
    return any(f"{one}." in name for one in modules_to_save)


def is_inside(name: str, modules_to_save: Iterable[str]) -> bool:
    """Whether PEFT skips the layer of that name because it sees it as part of a saved module."""
    return any(f".{one}." in f".{name}." for one in modules_to_save)


def anchored(name: str) -> str:
    """Return the key of `rank_pattern` or `alpha_pattern` for this layer only.

    PEFT reads these keys as regexes that match the end of a name, from the start or after any dot.
    """
    return "^" + re.escape(name)


def exact_targets(
    adapted: Iterable[str], modules: Collection[str] | None = None
) -> list[str] | str:
    r"""Return `target_modules` that select these layers and no other module.

    PEFT reads the entries of a list as endings of names. The result is a list of the last parts of
    the names if they select no other module, or else of the full names. If these select another
    module too, or if the model is unknown, the result is a regex that matches the full names.

    Args:
        adapted: names of the layers.
        modules: names of all modules of the model, if it is known.

    Raises:
        ConversionError: a name has too many parts, as only names in hostile files have.

    Examples:
        >>> from disha.interop.peft_files import exact_targets
        >>> exact_targets(["0.q", "1.q"], ["0", "0.q", "0.k", "1", "1.q", "1.k"])
        ['q']
        >>> exact_targets(["0.q"], ["0", "0.q", "0.k", "1", "1.q", "1.k"])
        ['0.q']
        >>> exact_targets(["layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v"])
        'layers\\.(0|1)\\.(q|v)'
    """
    wanted = set(adapted)
    if modules is not None:
        for targets in ({name.rpartition(".")[2] for name in wanted}, wanted):
            if {one for one in modules if not targets.isdisjoint(name_ends(one))} == wanted:
                return sorted(targets)
    names = sorted(name.split(".") for name in wanted)
    deepest = max(names, key=len)
    if len(deepest) > MOST_PARTS:
        raise ConversionError(
            f"the name {brief('.'.join(deepest))} has {len(deepest):,} parts; names with at most "
            f"{MOST_PARTS} can be written into target_modules. Get another version of the adapter"
        )
    return _regex(names)


def _regex(names: list[list[str]]) -> str:
    """Return a regex for names that are split at their dots; it has common parts once."""
    below: dict[str, list[list[str]]] = {}
    for first, *rest in names:
        below.setdefault(first, []).append(rest)
    alike: dict[str, list[str]] = {}
    for first, rests in below.items():
        alike.setdefault(_tail(rests), []).append(re.escape(first))
    return _any_of([_any_of(firsts) + tail for tail, firsts in alike.items()])


def _tail(rests: list[list[str]]) -> str:
    """Return a regex for what follows one part of a name."""
    longer = [rest for rest in rests if rest]
    if not longer:
        return ""
    tail = r"\." + _regex(longer)
    return tail if len(longer) == len(rests) else f"({tail})?"


def _any_of(options: list[str]) -> str:
    return options[0] if len(options) == 1 else f"({'|'.join(options)})"
