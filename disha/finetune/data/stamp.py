"""Opens data files, and notices if one changes during a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from disha import DishaError
from disha.files import opened_file
from disha.finetune.errors import DataError

__all__ = ["Stamp", "opened"]


@dataclass(frozen=True)
class Stamp:
    """A file's size in bytes and time of change in nanoseconds. They show whether it changed."""

    size: int
    modified: int

    @classmethod
    def of(cls, file: FileIO) -> Stamp:
        """Return the current stamp of an open file."""
        status = os.fstat(file.fileno())
        return cls(status.st_size, status.st_mtime_ns)


@contextmanager
def opened(path: Path, stamp: Stamp | None = None) -> Iterator[FileIO]:
    """Open a data file for reading, without a buffer.

    Args:
        path: the file.
        stamp: the stamp that it must have, if it has been opened before.

    Raises:
        DataError: it has another stamp, is not a regular file, or can't be read; also if reading
            fails inside the block.
    """
    try:
        with opened_file(path) as file:
            if stamp is not None:
                _require_unchanged(path, stamp, Stamp.of(file))
            yield file
    except DataError:
        raise
    except DishaError as error:
        raise DataError(str(error)) from error
    except MemoryError as error:
        raise DataError(
            f"{path} does not fit in memory; write its rows as JSON lines (.jsonl)"
        ) from error


def _require_unchanged(path: Path, before: Stamp, now: Stamp) -> None:
    if now != before:
        raise DataError(
            f"{path} was changed while it was being read ({before.size} bytes before, {now.size} "
            "bytes now); start again, and do not change data during a run"
        )
