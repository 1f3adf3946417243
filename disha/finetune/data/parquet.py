"""Rows of Parquet files, read by groups of rows."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from disha.finetune.data.rows import Block, Row, Rows
from disha.finetune.data.storage import Stamp, reading
from disha.finetune.errors import DataError, MissingDependencyError

__all__ = ["ParquetRows"]

MOST_BYTES_KEPT = 256 * 2**20

GroupKey: TypeAlias = tuple[Path, Stamp, int]


class Kept:
    """The groups of rows that this process read last."""

    def __init__(self) -> None:
        self._groups: OrderedDict[GroupKey, Any] = OrderedDict()

    @property
    def size(self) -> int:
        """How many bytes they take."""
        return sum(group.nbytes for group in self._groups.values())

    def group(self, key: GroupKey, read: Callable[[], Any]) -> Any:
        """Return a group of rows, after reading it where it is not kept."""
        if key not in self._groups:
            self._groups[key] = read()
            while len(self._groups) > 1 and self.size > MOST_BYTES_KEPT:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]


KEPT = Kept()


class ParquetRows(Rows):
    """The rows of a Parquet file.

    A group of rows can only be read whole. Those read last, of all files, are kept up to 256 MiB;
    one that is larger alone.

    Args:
        path: the file.

    Raises:
        DataError: it can't be read.
        MissingDependencyError: pyarrow is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stamp = Stamp.of(path)
        with self._opened() as file:
            metadata = file.metadata
            groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        self.sizes = tuple(group.total_byte_size for group in groups)
        self.ends = tuple(accumulate(group.num_rows for group in groups))

    def row(self, index: int) -> Row:
        """Return a row by its number."""
        number = bisect_right(self.ends, index)
        place = f"{self.path}, row {index + 1}"
        group = KEPT.group((self.path, self.stamp, number), lambda: self._read(number))
        table = group.slice(index - self.ends[number] + group.num_rows, 1)
        try:
            fields = table.to_pylist()[0]
        except UnicodeDecodeError as error:
            return Row({}, place, f"{place} is not UTF-8 text ({error.reason})")
        except (ValueError, OverflowError):
            fields = {name: _value(table.column(name)[0]) for name in table.column_names}
        return Row(fields, place)

    @property
    def is_in_blocks(self) -> bool:
        """Whether some rows can only be read together with others."""
        return True

    def block(self, index: int) -> Block:
        """Return the group of rows that a row is read with."""
        number = bisect_right(self.ends, index)
        return Block(str(self.path), number, self.sizes[number])

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def _read(self, number: int) -> Any:
        self.stamp.require_unchanged(self.path)
        with self._opened() as file:
            # Threads of pyarrow's own would not outlive a fork.
            return file.read_row_group(number, use_threads=False)

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        pyarrow, parquet = _pyarrow()
        try:
            with reading(self.path), parquet.ParquetFile(self.path) as file:
                yield file
        except pyarrow.ArrowException as error:
            raise DataError(f"{self.path} can't be read as Parquet: {error}") from error


def _value(scalar: Any) -> Any:
    """A value as Python has it; what it does not have, such as nanoseconds, stays pyarrow's."""
    try:
        return scalar.as_py()
    except (ValueError, OverflowError):
        return scalar


def _pyarrow() -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingDependencyError(
            "reading Parquet files needs pyarrow; run: pip install pyarrow"
        ) from error
    return pyarrow, pyarrow.parquet
