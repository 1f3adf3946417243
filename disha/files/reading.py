"""Read files from strangers: only regular files, small ones whole, with errors that name the file.

Opening a pipe waits for a writer, and a device such as `/dev/zero` has no end.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import BinaryIO, Literal

from disha.errors import AdapterFileError, AdapterIOError, DishaError

__all__ = [
    "LARGEST_TEXT",
    "Found",
    "explained",
    "found_at",
    "opened_file",
    "read_bytes",
    "read_text",
    "walked",
]

Found = Literal["file", "folder", "other"]

LARGEST_TEXT = 16 * 2**20
"""Largest size of a configuration or another small text, in bytes."""

KINDS: Mapping[str, Callable[[int], bool]] = {
    "a folder": stat.S_ISDIR,
    "a pipe": stat.S_ISFIFO,
    "a socket": stat.S_ISSOCK,
}


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
def opened_file(path: Path) -> Iterator[FileIO]:
    """Open a regular file for reading, without a buffer.

    Raises:
        AdapterIOError: it can't be read, or is a folder, a pipe or a device. Also raised for an
            `OSError` of the body.
    """
    with explained(path):
        _require_regular(path, os.stat(path))  # opening a device can have an effect
        with open(path, "rb", buffering=0, opener=_without_waiting) as file:
            _require_regular(path, os.fstat(file.fileno()))
            yield file


def read_bytes(path: Path, largest: int = LARGEST_TEXT) -> bytes:
    """Return the content of a regular file.

    Args:
        path: the file.
        largest: the largest allowed size in bytes.

    Raises:
        AdapterIOError: it is not a regular file, or can't be read.
        AdapterFileError: it is larger.
    """
    with opened_file(path) as file:
        return _limited(file, path, largest)


def read_text(path: Path, largest: int = LARGEST_TEXT, *, pipes: bool = False) -> str:
    """Return the content of a file of UTF-8 text, with or without a byte-order mark.

    Args:
        path: the file.
        largest: the largest allowed size in bytes.
        pipes: whether it may also be a pipe or a device, such as `/dev/stdin`. It is read to its
            end. A pipe that no program writes to is empty.

    Raises:
        AdapterIOError: it can't be read.
        AdapterFileError: it is larger, or not UTF-8.
    """
    if pipes:
        with explained(path), open(path, "rb", opener=_without_waiting) as file:
            content = _limited(file, path, largest)
    else:
        content = read_bytes(path, largest)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AdapterFileError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error


def _require_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for name, holds in KINDS.items() if holds(status.st_mode)), "a device")
        raise AdapterIOError(f"can't read {path}: it is {kind}, not a regular file; check the path")


def _limited(file: BinaryIO, path: Path, largest: int) -> bytes:
    content = file.read(largest + 1)
    if len(content) > largest:
        raise AdapterFileError(
            f"{path} is larger than {largest:,} bytes, too large for such a file; check the path"
        )
    return content


def _without_waiting(path: str, flags: int) -> int:
    """Open a file at once, even a pipe that nothing writes to yet. Reading waits as usual."""
    if not hasattr(os, "O_NONBLOCK"):  # Windows has no pipes among its files
        return os.open(path, flags)
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    return descriptor


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
