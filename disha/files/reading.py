"""Open files from strangers: only regular files, with errors that name the file."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from disha.errors import AdapterIOError, DishaError

__all__ = ["explained", "opened_file"]


@contextmanager
def opened_file(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading, without a buffer.

    Raises:
        AdapterIOError: it can't be read, or is a folder, a pipe or a device. Also raised for an
            `OSError` of the body.
    """
    with explained(path):
        if path.is_dir():
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
