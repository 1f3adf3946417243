"""Save files so that a reader finds the old version or the new one, each of them whole.

The new version is written in a folder beside the target, then takes its place. A killed save leaves
that folder. Its name depends only on the target, so the next save of the target removes it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, distributed

from disha.errors import AdapterIOError, ArgumentTypeError

__all__ = ["PathLike", "checked_path", "save", "save_tensors"]

PathLike = str | os.PathLike[str]


def checked_path(path: object) -> Path:
    """Return a path as a `Path`."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise ArgumentTypeError(f"path must be a str or a pathlib.Path, got {path!r}")
    return Path(path)


def save(path: PathLike, write: Callable[[Path], object]) -> None:
    """Save what `write` writes to the path that it gets. A symbolic link stays."""
    target = Path(os.path.realpath(checked_path(path)))
    many = distributed.is_available() and distributed.is_initialized()  # ranks may save at once
    draft = target.with_name(f".{target.name}.{distributed.get_rank() if many else 0}.tmp")
    new = draft / target.name
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        write(new)
        # safetensors makes files that only their owner can read.
        new.chmod((target if target.exists() else draft).stat().st_mode & 0o666)
        with new.open("r+b") as file:
            os.fsync(file.fileno())
        new.replace(target)
    except (OSError, ValueError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise AdapterIOError(f"can't save to {target}: {reason}; nothing was changed") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def save_tensors(path: PathLike, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Save a safetensors file. Of the files in a folder, save the configuration last."""
    whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save(path, lambda new: save_file(whole, new, metadata))
