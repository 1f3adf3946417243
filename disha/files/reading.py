"""Look at paths and open files from strangers, with errors that name the path."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

from disha.errors import AdapterIOError, DishaError

__all__ = ["Found", "explained", "found_at", "opened_file", "walked"]

Found = Literal["file", "folder", "other"]


def found_at(path: Path) -> Found | None:
    """Return what is at a path. Links are followed.

    Raises:
        AdapterIOError: the system can't tell.
    """
    with explained(path):
        try:
            mode = os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"


def walked(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Return `os.walk` of a folder that raises where something can't be read."""

    def fail(error: OSError) -> None:
        raise error

    return os.walk(folder, onerror=fail)


@contextmanager
def opened_file(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading, without a buffer.

    Raises:
        AdapterIOError: it can't be read, or is a folder, a pipe or a device. Also raised for an
            `OSError` of the body.
    """
    with explained(path):
        if found_at(path) == "folder":
            raise AdapterIOError(f"can't read {path}: it is a folder; name a file")
        with open(path, "rb", buffering=0, opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise AdapterIOError(
                    f"can't read {path}: it is not a regular file; copy it into one"
                )
            yield file


def _without_waiting(path: str, flags: int) -> int:
    # Otherwise, opening a pipe waits for a writer. Regular files are read as usual.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Convert an `OSError` of the body to an `AdapterIOError` that names the file."""
    try:
        yield
    except OSError as error:
        if isinstance(error, DishaError):
            raise
        raise AdapterIOError(
            f"can't read {path}: {error.strerror or error}; check the path"
        ) from error
