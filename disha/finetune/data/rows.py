"""Rows, and sequences of rows in memory or on disk.

A row that can't be read stays in its sequence and raises when its fields are asked for. So the
reader of a sequence decides whether to stop or to count bad rows.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
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
        names: the names of the fields to learn, if its data set has its own.
    """

    fields: Mapping[str, Any]
    place: str
    complaint: str | None = None
    names: tuple[str, ...] = ()

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
        names: for each file, the names of its fields to learn, if data sets have their own.
        sizes: how many of the rows each data set has, if there are several.
    """

    def __init__(
        self,
        files: Sequence[RowFile],
        numbers: Sequence[int] | None = None,
        names: Sequence[tuple[str, ...]] = (),
        sizes: Sequence[int] = (),
    ) -> None:
        self.files, self.names = files, names
        self._ends = list(accumulate(map(len, files)))
        self.numbers = range(self._ends[-1] if files else 0) if numbers is None else numbers
        self.sizes = sizes or (len(self),)

    @classmethod
    def joined(cls, parts: Sequence[Rows], names: Sequence[tuple[str, ...]]) -> Rows:
        """Return the rows of several data sets, one after the other.

        Args:
            parts: the rows of each.
            names: the names of the fields to learn, for each.
        """
        if len(parts) == 1:
            return parts[0]
        numbers, start = array("q"), 0
        for part in parts:
            numbers.extend(start + number for number in part.numbers)
            start += sum(map(len, part.files))
        of_files = [own for part, own in zip(parts, names, strict=True) for _ in part.files]
        of_files = of_files if len(set(names)) > 1 else []
        files = [file for part in parts for file in part.files]
        return cls(files, numbers, of_files, [len(part) for part in parts])

    def parts(self) -> list[Rows]:
        """Return the rows of each data set."""
        ends = list(accumulate(self.sizes, initial=0))
        return [self[first:end] for first, end in pairwise(ends)]

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> Rows: ...

    def __getitem__(self, index: int | slice) -> Row | Rows:
        if isinstance(index, slice):
            return Rows(self.files, self.numbers[index], self.names)
        file, number = self.find(index)
        if not self.names:
            return file[number]
        return replace(file[number], names=self.names[self._place(index)])

    def find(self, index: int) -> tuple[RowFile, int]:
        """Return the file that holds a row, and the number of the row in that file."""
        place = self._place(index)
        start = self._ends[place] - len(self.files[place])
        return self.files[place], self.numbers[index] - start

    def _place(self, index: int) -> int:
        return bisect_right(self._ends, self.numbers[index])

    def select(self, indices: Iterable[int]) -> Rows:
        """Return the rows with these numbers, in the given order."""
        numbers = array("q", (self.numbers[index] for index in indices))
        return Rows(self.files, numbers, self.names)


@dataclass(frozen=True)
class Dataset:
    """The rows to train on, and the held-out rows to measure on (maybe none)."""

    training: Rows
    held_out: Rows
