"""The bytes of a data file, in memory or on disk."""

from __future__ import annotations

import codecs
import gzip
import io
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from disha.finetune.errors import DataError

__all__ = ["InMemory", "OnDisk", "Stamp", "Storage", "reading"]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the system says against reading a file into `DataError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"there is no data file {path}") from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from error


@dataclass(frozen=True)
class Stamp:
    """What tells that a file was changed.

    Args:
        size: in bytes.
        modified: when, in nanoseconds.
    """

    size: int
    modified: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """The stamp of a file as it is now."""
        with reading(path):
            status = path.stat()
        return cls(status.st_size, status.st_mtime_ns)

    def require_unchanged(self, path: Path) -> None:
        """Check that the file is still as it was.

        Raises:
            DataError: it is not.
        """
        now = Stamp.of(path)
        if now != self:
            raise DataError(
                f"{path} was changed while it was being read (from {self.size} to {now.size} "
                "bytes, or at the same size); start again, and leave data as they are during a run"
            )


class Storage(ABC):
    """Text in UTF-8, with or without a byte-order mark, to be read in pieces."""

    path: Path

    @property
    @abstractmethod
    def size(self) -> int:
        """How many bytes there are."""

    @abstractmethod
    def read(self, start: int, end: int) -> bytes:
        """Return the bytes from `start` up to `end`."""

    @abstractmethod
    def _opened(self) -> BinaryIO:
        """Return a new handle to read from the beginning."""

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield every line with its place in bytes. Only a line feed ends a line.

        Raises:
            DataError: the file can't be read, or is in UTF-16.
        """
        with reading(self.path), self._opened() as handle:
            start = _first_byte(handle.read(len(codecs.BOM_UTF8)), self.path)
            handle.seek(start)
            for line in handle:
                yield start, line
                start += len(line)


def _first_byte(beginning: bytes, path: Path) -> int:
    if beginning[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise DataError(f"{path} is not UTF-8 text but UTF-16; save it as UTF-8")
    return len(codecs.BOM_UTF8) if beginning == codecs.BOM_UTF8 else 0


@dataclass(frozen=True)
class InMemory(Storage):
    """The bytes of a file, read at once."""

    path: Path
    content: bytes

    @classmethod
    def of(cls, path: Path) -> InMemory:
        """Read a file; one whose name ends with .gz is unpacked.

        Raises:
            DataError: it can't be read.
        """
        with reading(path):
            content = path.read_bytes()
        if path.suffix.lower() != ".gz":
            return cls(path, content)
        try:
            return cls(path, gzip.decompress(content))
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} can't be unpacked, it is damaged: {error}") from error

    @property
    def size(self) -> int:
        """How many bytes there are."""
        return len(self.content)

    def read(self, start: int, end: int) -> bytes:
        """Return the bytes from `start` up to `end`."""
        return self.content[start:end]

    def _opened(self) -> BinaryIO:
        return io.BytesIO(self.content)


class OnDisk(Storage):
    """The bytes of a file, read when they are asked for.

    Every process opens the file itself: a handle that came with a fork would share its place in
    the file with the parent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stamp = Stamp.of(path)
        self._handle: BinaryIO | None = None
        self._process = 0

    @property
    def size(self) -> int:
        """How many bytes there are."""
        return self.stamp.size

    def read(self, start: int, end: int) -> bytes:
        """Return the bytes from `start` up to `end`.

        Raises:
            DataError: the file can't be read, or was changed since the beginning.
        """
        self.stamp.require_unchanged(self.path)
        with reading(self.path):
            handle = self._own_handle()
            handle.seek(start)
            return handle.read(end - start)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_handle": None}

    def _opened(self) -> BinaryIO:
        self.stamp.require_unchanged(self.path)
        return self.path.open("rb")

    def _own_handle(self) -> BinaryIO:
        if self._handle is None or self._process != os.getpid():
            self._handle, self._process = self._opened(), os.getpid()
        return self._handle
