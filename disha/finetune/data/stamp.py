"""Reads data files, and notices if one changes during a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from disha.finetune.errors import DataError

__all__ = ["Stamp", "reading"]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the system's errors about reading a file into `DataError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"there is no data file {path}") from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from error


@dataclass(frozen=True)
class Stamp:
    """A file's size in bytes and time of change in nanoseconds, which show whether it changed."""

    size: int
    modified: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """Return the current stamp of a file."""
        with reading(path):
            status = path.stat()
        return cls(status.st_size, status.st_mtime_ns)

    def require_unchanged(self, path: Path) -> None:
        """Check that the file has not changed.

        Raises:
            DataError: it has.
        """
        now = Stamp.of(path)
        if now != self:
            raise DataError(
                f"{path} was changed while it was being read (from {self.size} to {now.size} "
                "bytes, or at the same size); start again, and leave data as they are during a run"
            )
