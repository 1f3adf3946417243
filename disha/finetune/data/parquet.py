"""Reads rows of Parquet files, one group of rows at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import disha
from disha.finetune.data.rows import Row
from disha.finetune.data.stamp import Stamp, opened
from disha.finetune.errors import DataError

__all__ = ["Group", "ParquetRows"]

MOST_BYTES_KEPT = 256 * 2**20
"""The most bytes of recently read groups that stay in memory, over all files."""


class Group(NamedTuple):
    """Rows that can only be read together, so it is best to use them close together.

    Attributes:
        path: the file.
        stamp: the file's stamp when it was opened.
        number: the group's number in the file, from 0.
        size: about how many bytes it has.
    """

    path: Path
    stamp: Stamp
    number: int
    size: int


_kept: OrderedDict[Group, Any] = OrderedDict()


class ParquetRows:
    """The rows of a Parquet file.

    Args:
        path: the file.

    Raises:
        DataError: it can't be read.
        MissingPackageError: pyarrow is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with opened(path) as file:
            stamp = Stamp.of(file)
        with _opened(path, stamp) as table:
            metadata = table.metadata
            groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        self._groups = [Group(path, stamp, i, one.total_byte_size) for i, one in enumerate(groups)]
        self._ends = list(accumulate(group.num_rows for group in groups))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:
        """Return a row by its number, from 0."""
        group = self.group(index)
        place = f"{self.path}, row {index + 1}"
        table = _table(group)
        one = table.slice(index - self._ends[group.number] + table.num_rows, 1)
        try:
            fields = {name: _value(one.column(name)[0]) for name in one.column_names}
        except UnicodeDecodeError as error:
            return Row({}, place, f"{place} is not UTF-8 text ({error.reason})")
        return Row(fields, place)

    def group(self, index: int) -> Group:
        """Return the group that a row is read with."""
        return self._groups[bisect_right(self._ends, index)]


def _table(group: Group) -> Any:
    """Return the rows of a group, from memory or else from the file."""
    if group not in _kept:
        with _opened(group.path, group.stamp) as file:
            # pyarrow's own threads would not survive a fork.
            _kept[group] = file.read_row_group(group.number, use_threads=False)
        while len(_kept) > 1 and sum(table.nbytes for table in _kept.values()) > MOST_BYTES_KEPT:
            _kept.popitem(last=False)
    _kept.move_to_end(group)
    return _kept[group]


@contextmanager
def _opened(path: Path, stamp: Stamp) -> Iterator[Any]:
    pyarrow, parquet = _pyarrow()
    with opened(path, stamp) as file:
        try:
            with parquet.ParquetFile(file) as table:
                yield table
        except (pyarrow.ArrowException, OSError) as error:
            if getattr(error, "errno", None):  # the system's own
                raise
            why = " ".join(str(error).split())
            raise DataError(f"{path} can't be read as Parquet: {why}") from error


def _value(scalar: Any) -> Any:
    """Return a Python value, or pyarrow's own if Python has none, as for nanoseconds."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        raise
    except (ValueError, OverflowError):
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
