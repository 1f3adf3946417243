"""Writing files whole or not at all: no path ever leads to a part of one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from disha.errors import AdapterIOError, ArgumentTypeError

__all__ = ["PathLike", "checked_path", "write_whole", "write_whole_folder"]

PathLike = str | os.PathLike[str]

Write = Callable[[str], None]
"""Fills the file at a path; raises OSError if it can't."""


def checked_path(path: object) -> Path:
    """Return a path that the file system can be asked about."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise ArgumentTypeError(
            f"path must be a str or a pathlib.Path, got {path!r} of type {type(path).__name__}"
        )
    try:
        os.fspath(path).encode()  # safetensors reads no other names
        with suppress(FileNotFoundError):  # one to be written, or missed with its own message
            os.stat(path)
    except (OSError, ValueError) as error:
        raise AdapterIOError(f"{str(path)[:80]!r} can't be a file here: {error}") from error
    return Path(path)


def write_whole(path: Path, write: Write) -> None:
    """Let `write` fill a file so that its path never leads to a part of it.

    Args:
        path: where the file is to be; its folder exists. A symbolic link stays, and what it
            leads to is replaced.
        write: fills the file at the path that it is given, another one in the same folder.

    Raises:
        AdapterIOError: it can't be written; what was there is unchanged.
    """
    _replace_all({path: write})


def write_whole_folder(folder: Path, files: Mapping[str, Write]) -> None:
    """Write several files into a folder, each whole, and none before all of them are complete.

    Args:
        folder: made if it is not there; its parent exists. Other files in it stay.
        files: name -> what fills it. They take their places in this order: name the one last
            that makes a reader look for the others.

    Raises:
        AdapterIOError: something can't be written; what was there is unchanged.
    """
    if folder.exists() and not folder.is_dir():
        raise AdapterIOError(f"can't save to {folder}: it is a file; name a folder")
    made = not folder.exists()
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise AdapterIOError(f"can't make the folder {folder}: {error.strerror}") from error
    try:
        _replace_all({folder / name: write for name, write in files.items()})
    except BaseException:
        if made:
            with suppress(OSError):  # somebody else has put something into it
                folder.rmdir()
        raise


def _replace_all(files: Mapping[Path, Write]) -> None:
    targets = {path: _regular_target(path) for path in files}
    staged: dict[Path, str] = {}
    current = next(iter(files))
    try:
        for current, write in files.items():
            target = targets[current]
            descriptor, temporary = tempfile.mkstemp(".tmp", f".{target.name}.", target.parent)
            os.close(descriptor)
            staged[current] = temporary
            write(temporary)
            os.chmod(temporary, _permissions(target))
            _sync(Path(temporary))
        for current in files:
            os.replace(staged[current], targets[current])
            del staged[current]
        for parent in {target.parent for target in targets.values()}:
            _sync(parent)
    except OSError as error:
        raise AdapterIOError(
            f"can't save to {current}: {error.strerror or error}; what was there is unchanged"
        ) from error
    finally:
        for temporary in staged.values():
            os.unlink(temporary)


def _regular_target(path: Path) -> Path:
    """Return where a file will be, links followed; raise if it can't be there."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise AdapterIOError(f"can't save to {path}: it is a folder; name a file in it")
    if target.exists() and not target.is_file():
        raise AdapterIOError(f"can't save to {path}: it is no regular file; name another")
    if not target.parent.is_dir():
        raise AdapterIOError(
            f"can't save to {path}: the folder {target.parent} does not exist; create it first"
        )
    return target


def _permissions(target: Path) -> int:
    """The mode of the file that is replaced, or else what a new file would get."""
    if target.exists():
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _sync(path: Path) -> None:
    """Let a file, or a folder with its names, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
