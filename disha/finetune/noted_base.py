"""The note in an adapter file that says where its base model is.

The note holds the flags of the model as JSON. A path in it is relative to the folder of the adapter
file, and begins with a dot. So the note stays right when both are moved together, and tells little
about the machine. Any other text is a name, such as one of the Hugging Face hub.

A file may be from a stranger. So a function in a note is never called, and a path in a note never
leads to another machine.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, get_args

import disha
from disha.finetune.errors import SettingsError
from disha.finetune.settings import Bits, ModelSettings

__all__ = ["BASE_KEY", "base_note", "noted_base"]

BASE_KEY = "base"
"""The key of the note."""

PATHS = ("base_model_name_or_path", "tokenizer")
KNOWN = {*PATHS, "model", "bits"}
NAME = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?", re.ASCII)
LONGEST_PATH = 1000

SYSTEM = ("dev", "net", "proc", "sys")
"""Folders at the root that hold devices, or other machines, and no models."""

REMEDY = "name the base yourself (--base_model_name_or_path; for disha merge, BASE)"


def base_note(settings: ModelSettings, base: Path | None, adapter: Path) -> str:
    """Return the note for an adapter file.

    Args:
        settings: the settings of the model.
        base: the file or folder of the model; None if a function makes it.
        adapter: the adapter file.
    """
    noted = {
        "base_model_name_or_path": _noted_path(base, adapter),
        "model": settings.model,
        "tokenizer": _noted_path(settings.tokenizer, adapter),
        "bits": settings.bits,
    }
    return json.dumps({name: value for name, value in noted.items() if value is not None})


def noted_base(adapter: Path) -> ModelSettings | None:
    """Return the settings of the model that an adapter file notes; None without a note.

    Raises:
        DishaError: the file can't be read; or its note can't be used, names a function, or names
            something that is not there.
    """
    text = disha.inspect_adapter(adapter).metadata.get(BASE_KEY)
    if text is None:
        return None
    note = _parsed(text, adapter)
    if "model" in note:
        raise SettingsError(
            f"{adapter} notes that the function {note['model']!a} makes its base; a function is "
            f"code, so it is never called by a note: give --model {note['model']!a} if you trust it"
        )
    paths = {name: _found(note[name], name, adapter) for name in PATHS if name in note}
    return ModelSettings(**paths, bits=note.get("bits", "fp32"))  # type: ignore[arg-type]


def _noted_path(path: Path | None, adapter: Path) -> str | None:
    if path is None or not path.exists():
        return None if path is None else path.as_posix()
    try:
        relative = os.path.relpath(path.absolute(), adapter.parent.resolve())
    except ValueError:  # another drive of Windows
        return None
    # A path inside the folder needs the dot too, so that it is not taken for a name.
    return f"./{Path(relative).as_posix()}"


def _parsed(text: str, adapter: Path) -> dict[str, Any]:
    try:
        note = json.loads(text)
    except (ValueError, RecursionError):
        note = None
    if (
        not isinstance(note, dict)
        or not note.keys() <= KNOWN
        or not all(isinstance(value, str) for value in note.values())
        or note.get("bits", "fp32") not in get_args(Bits)
    ):
        raise SettingsError(
            f"{adapter} has a note of its base that can't be used, {text[:100]!a}; {REMEDY}"
        )
    return note


def _found(noted: str, flag: str, adapter: Path) -> Path:
    """Return the path that a note means."""
    if NAME.fullmatch(noted):
        return Path(noted)
    folder = adapter.parent.resolve()
    path = Path(os.path.normpath(folder / noted))
    is_relative = noted.startswith("./") and len(noted) <= LONGEST_PATH and noted.isprintable()
    if not is_relative or "\\" in noted or path.parts[1:2] in [(name,) for name in SYSTEM]:
        raise SettingsError(
            f"{adapter} notes {noted[:100]!a} as --{flag}, which is neither a path from its folder "
            f"nor a name; {REMEDY}"
        )
    if not (path.is_file() or path.is_dir()):
        raise SettingsError(
            f"{adapter} notes {noted!a} as --{flag}, but there is no file or folder {path}; "
            f"{REMEDY}"
        )
    return path
