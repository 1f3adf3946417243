"""Files on disk: save them whole, open safetensors, and say what a file is that is none.

A new version is written in a folder of its own beside the target, then takes its place. A killed
save leaves that folder, and the next save of the same target removes it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from glob import escape
from pathlib import Path
from secrets import token_hex
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from disha.errors import AdapterFileError, AdapterIOError, ArgumentError, ArgumentTypeError
from disha.model.records import Tensors

PathLike = str | os.PathLike[str]

ADAPTER_NAME = "adapter.safetensors"  # in output folders and checkpoints

OF_TORCH = {"format": "pt"}  # metadata that other loaders require
PICKLES = (b"PK\x03\x04", b"\x80")  # how the files of torch.save begin


def checked_path(path: Any) -> Path:
    """Return a path as a `Path`."""
    try:
        return Path(path)
    except TypeError as error:
        raise ArgumentTypeError(f"path must be a str or a pathlib.Path, got {path!r}") from error


def file_at(path: PathLike) -> Path:
    """Return the path of an adapter file; a folder stands for the file of the usual name in it."""
    found = checked_path(path)
    is_folder = not os.path.basename(path) or os.path.isdir(found)  # no name after the last slash
    return found / ADAPTER_NAME if is_folder else found


def require_free(path: Path, overwrite: bool) -> None:
    """Raise if a file or a folder with content is at `path`, unless `overwrite` is set."""
    if not overwrite and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ArgumentError(f"{path} exists; choose another name, or set `overwrite` (--overwrite)")


def save(path: PathLike, write: Callable[[Path], object]) -> None:
    """Save the file or folder that `write` writes to the path that it gets. A symbolic link stays.

    Of several that save to one path at once, the last one wins, and removes what the others left.
    """
    target = Path(os.path.realpath(checked_path(path)))
    draft = target.with_name(f".{target.name}.{token_hex(4)}.tmp")
    new = draft / target.name
    old = draft / f"{target.name}.old"
    is_made = False
    try:
        if target.exists() and not (target.is_file() or target.is_dir()):
            raise OSError("it is a device or a pipe")
        draft.mkdir()
        is_made = True
        write(new)
        for file in filter(Path.is_file, (new, *new.rglob("*"))):
            # safetensors makes files that only their owner can read.
            file.chmod((target if target.is_file() else draft).stat().st_mode & 0o666)
            with file.open("r+b") as written:
                os.fsync(written.fileno())
        if new.is_dir() and target.exists():
            target.rename(old)  # nothing takes the place of a folder in one step
        new.replace(target)
        for left in target.parent.glob(f".{escape(target.name)}.{'[0-9a-f]' * 8}.tmp"):
            with suppress(OSError):  # another one has removed it
                left.rename(draft / left.name)
    except (OSError, ValueError, SafetensorError) as error:
        if is_made and not draft.exists():
            return  # another one has saved since
        reason = getattr(error, "strerror", None) or error
        raise AdapterIOError(f"can't save to {target}: {reason}; nothing was changed") from error
    finally:
        if is_made and old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(draft, ignore_errors=True)


def save_tensors(path: PathLike, tensors: Tensors, metadata: dict[str, str] = OF_TORCH) -> None:
    """Save a safetensors file. Of the files in a folder, save the configuration last."""
    whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save(path, lambda new: save_file(whole, new, metadata))


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
        reason = getattr(error, "strerror", None) or error
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
    return (
        f"{path.parent} is a folder of PEFT; read it with disha.interop.{reader}.load, or make an "
        "adapter file of it with disha convert"
    )
