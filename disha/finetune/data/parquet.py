"""Reads rows of Parquet files, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import disha
from disha.finetune.data.rows import Row, require_names_once
from disha.finetune.data.stamp import Stamp, opened
from disha.finetune.errors import DataError

__all__ = ["ParquetRows"]

ROWS_TOGETHER = 256
"""How many rows are in memory at a time."""


class ParquetRows:
    """The rows of a Parquet file.

    Args:
        path: the file.

    Raises:
        DataError: it can't be read, or two of its columns have one name.
        MissingPackageError: pyarrow is not installed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with opened(path) as file:
            self._stamp = Stamp.of(file)
        with self._opened() as table:
            self._count: int = table.metadata.num_rows
            require_names_once(table.schema_arrow.names, path)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Row]:
        number = 0
        with self._opened() as table:
            # pyarrow's own threads would not survive a fork.
            for batch in table.iter_batches(ROWS_TOGETHER, use_threads=False):
                for place in range(batch.num_rows):
                    number += 1
                    yield _row(batch, place, f"{self._path}, row {number}")

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        pyarrow, parquet = _pyarrow()
        with opened(self._path, self._stamp) as file:
            try:
                with parquet.ParquetFile(file, pre_buffer=False) as table:
                    yield table
            except (pyarrow.ArrowException, OSError) as error:
                if getattr(error, "errno", None):  # the system's own
                    raise
                why = " ".join(str(error).split())
                raise DataError(f"{self._path} can't be read as Parquet: {why}") from error


def _row(batch: Any, index: int, place: str) -> Row:
    try:
        fields = {name: _value(batch.column(name)[index]) for name in batch.schema.names}
    except UnicodeDecodeError as error:
        return Row({}, place, f"{place} is not UTF-8 text ({error.reason})")
    return Row(fields, place)


def _value(scalar: Any) -> Any:
    """Return a Python value. If Python has none, as for nanoseconds, return pyarrow's own.

    Python also lacks times of a zone that the system does not know.
    """
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        raise
    except (ValueError, OverflowError, LookupError):
        return scalar


def _pyarrow() -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise disha.MissingPackageError(
            "reading Parquet files needs pyarrow; run: pip install pyarrow"
        ) from error
    return pyarrow, pyarrow.parquet
