"""Rows, and sequences of rows in memory or on disk.

A row that can't be read stays in its sequence and raises when its fields are asked for. So the
reader of a sequence decides whether to stop or to count bad rows.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol, overload

from disha.finetune.errors import BadRowError

__all__ = ["Dataset", "Row", "RowFile", "Rows", "checked_text"]


@dataclass(frozen=True)
class Row:
    """One row of data.

    Args:
        fields: its values by field name.
        place: where it is from, as in "rows.jsonl, line 7"; for messages.
        complaint: why it can't be read; None if it can.
    """

    fields: Mapping[str, Any]
    place: str
    complaint: str | None = None

    def __getitem__(self, name: str) -> Any:
        """Return the value of a field.

        Raises:
            BadRowError: there is no such field, or the row can't be read.
        """
        if self.complaint is not None:
            raise BadRowError(self.complaint)
        if name not in self.fields:
            found = ", ".join(map(repr, self.fields)) or "none"
            raise BadRowError(
                f"{self.place} has no field {name!r}; its fields are: {found} "
                "(--dataset_field names those to use)"
            )
        return self.fields[name]

    def text(self, name: str) -> str:
        """Return the value of a field, which must be text.

        Raises:
            BadRowError: the value is not text, or there is no such field.
        """
        return checked_text(self[name], f"{self.place}: field {name!r}")


def checked_text(value: object, what: str) -> str:
    """Return `value` if it is valid text. Raise if it is something else.

    Args:
        value: anything.
        what: its name in messages.

    Raises:
        BadRowError: it is not such text.
    """
    if not isinstance(value, str):
        raise BadRowError(f"{what} must be text, found {type(value).__name__} {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRowError(
            f"{what} holds half of a surrogate pair at character {error.start}, so it is not "
            "valid text; an emoji may have been cut in two"
        ) from error
    return value


class RowFile(Protocol):
    """The rows of one file: a list of rows, or a file that is read row by row."""

    def __len__(self) -> int:
        """How many rows there are."""

    def __getitem__(self, index: int, /) -> Row:
        """Return a row by its number, from 0."""


class Rows(Sequence[Row]):
    """Rows of one or several files. Slicing and selecting read and copy no row.

    Args:
        files: the files, in order.
        numbers: which rows, counted through all files; all rows if not given.
    """

    def __init__(self, files: Sequence[RowFile], numbers: Sequence[int] | None = None) -> None:
        self.files = files
        self._ends = list(accumulate(map(len, files)))
        self.numbers = range(self._ends[-1] if files else 0) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> Rows: ...

    def __getitem__(self, index: int | slice) -> Row | Rows:
        if isinstance(index, slice):
            return Rows(self.files, self.numbers[index])
        file, number = self.find(index)
        return file[number]

    def find(self, index: int) -> tuple[RowFile, int]:
        """Return the file that holds a row, and the number of the row in that file."""
        number = self.numbers[index]
        place = bisect_right(self._ends, number)
        return self.files[place], number - (self._ends[place] - len(self.files[place]))

    def select(self, indices: Iterable[int]) -> Rows:
        """Return the rows with these numbers, in the given order."""
        return Rows(self.files, array("q", (self.numbers[index] for index in indices)))


@dataclass(frozen=True)
class Dataset:
    """The rows to train on, and the held-out rows to measure on (maybe none)."""

    training: Rows
    held_out: Rows
