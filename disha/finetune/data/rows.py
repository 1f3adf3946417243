"""Rows, in memory or on disk, which are read one after another.

A row that can't be read stays among the others, and raises only when its fields are asked for. So
the reader decides whether to stop at bad rows or to count them.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any, Protocol, TypeVar

from disha.finetune.errors import BadRowError, DataError
from disha.text import brief

__all__ = ["Dataset", "Row", "RowFile", "Rows", "checked_text", "pieces", "require_names_once"]

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One row of data.

    Args:
        fields: its values by field name.
        place: where it is from, as in "rows.jsonl, line 7"; for messages.
        complaint: why it can't be read; None if it can.
        names: the names of the fields to learn, if data sets have different ones.
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
        raise BadRowError(f"{what} must be text, found {type(value).__name__} {brief(value):.60}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRowError(
            f"{what} holds half of a surrogate pair at character {error.start}, so it is not "
            "valid text; an emoji may have been cut in two"
        ) from error
    return value


def require_names_once(names: Sequence[str], path: Path) -> None:
    """Raise `DataError` if two fields of a file have one name.

    Args:
        names: the names of its fields.
        path: the file; for messages.
    """
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path} has several fields named {twice!r}; give each its own name")


def pieces(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield items, such as rows, in lists of `size`. The last list may be shorter."""
    remaining = iter(items)
    while piece := list(islice(remaining, size)):
        yield piece


class RowFile(Protocol):
    """The rows of one file: a list of rows, or a file that is read row by row."""

    def __len__(self) -> int:
        """How many rows there are."""

    def __iter__(self) -> Iterator[Row]:
        """Read the rows."""


class Rows:
    """Rows of one or several files. Slicing and selecting read and copy no row.

    Args:
        files: the files, in order.
        numbers: which rows, counted through all files; all rows if not given.
        names: for each file, the names of its fields to learn, if data sets have different ones.
        sizes: how many of the rows each data set has, if there are several.
    """

    def __init__(
        self,
        files: Sequence[RowFile],
        numbers: Sequence[int] | None = None,
        names: Sequence[tuple[str, ...]] = (),
        sizes: Sequence[int] = (),
    ) -> None:
        self.files, self._names = files, names
        self._starts = list(accumulate(map(len, files), initial=0))
        self._numbers = range(self._starts[-1]) if numbers is None else numbers
        self._sizes = sizes or (len(self),)

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
            numbers.extend(start + number for number in part._numbers)
            start += sum(map(len, part.files))
        of_files = [own for part, own in zip(parts, names, strict=True) for _ in part.files]
        of_files = of_files if len(set(names)) > 1 else []
        files = [file for part in parts for file in part.files]
        return cls(files, numbers, of_files, [len(part) for part in parts])

    def parts(self) -> list[Rows]:
        """Return the rows of each data set."""
        ends = list(accumulate(self._sizes, initial=0))
        return [self[first:end] for first, end in pairwise(ends)]

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Row]:
        """Read the rows. A file is read again only to go back to an earlier row of it."""
        reader: Iterator[Row] = iter(())
        current, following = -1, 0
        for number in self._numbers:
            place = bisect_right(self._starts, number) - 1
            if place != current or number < following:
                reader, current, following = iter(self.files[place]), place, self._starts[place]
            row = next(islice(reader, number - following, None))
            following = number + 1
            yield replace(row, names=self._names[place]) if self._names else row

    def __getitem__(self, part: slice) -> Rows:
        return Rows(self.files, self._numbers[part], self._names)

    def select(self, indices: Iterable[int]) -> Rows:
        """Return the rows with these numbers, in the given order."""
        numbers = array("q", (self._numbers[index] for index in indices))
        return Rows(self.files, numbers, self._names)


@dataclass(frozen=True)
class Dataset:
    """The rows to train on, and the held-out rows to measure on. There may be no held-out rows."""

    training: Rows
    held_out: Rows
