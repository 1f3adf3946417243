"""Open safetensors files, and say what a file is that is none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from disha.errors import AdapterFileError, AdapterIOError
from disha.files.saving import PathLike, checked_path

__all__ = ["ADAPTER_NAME", "file_at", "opened", "other_format"]

ADAPTER_NAME = "adapter.safetensors"
"""The name of the adapter file in output folders and checkpoints."""

PICKLES = (b"PK\x03\x04", b"\x80")
"""How the files of torch.save begin."""


def file_at(path: PathLike) -> Path:
    """Return the path of an adapter file; a folder stands for the file of the usual name in it."""
    found = checked_path(path)
    is_folder = os.fspath(path).endswith(("/", os.sep)) or os.path.isdir(found)
    return found / ADAPTER_NAME if is_folder else found


def opened(path: Path) -> Any:
    """Open a safetensors file by `safe_open`."""
    try:
        with open(path, "rb") as file:
            start = file.read(4)
        return safe_open(path, "pt")
    except (OSError, ValueError) as error:
        other = other_format(path)
        if other is not None:
            raise AdapterFileError(other) from error
        reason = error.strerror if isinstance(error, OSError) else error
        raise AdapterIOError(f"can't read {path}: {reason}; check the path") from error
    except SafetensorError as error:
        if start.startswith(PICKLES):
            raise AdapterFileError(
                f"{path} is a pickle, as torch.save writes; read it with torch.load, and give the "
                "result to load_adapter_state_dict"
            ) from error
        raise AdapterFileError(
            f"{path} is not a complete safetensors file ({error}); it is damaged, was cut off, or "
            "is another kind of file. Get it again"
        ) from error


def other_format(path: Path) -> str | None:
    """Return what to do with a path in a folder that PEFT wrote, or None for another path."""
    config = path.parent / "adapter_config.json"
    if not os.path.isfile(config):
        return None
    reader = "lora" if '"LORA"' in config.read_text(errors="replace") else "peft"
    return f"{path.parent} is a folder of PEFT; read it with disha.interop.{reader}.load"
