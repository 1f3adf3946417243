"""Rows, and sequences of rows.

A sequence of rows may be in memory or on disk. A row that can't be read is in it nevertheless, and
complains when its fields are asked for: whoever asks decides whether to stop or to count it.
"""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple, overload

from disha.finetune.errors import BadRowError

__all__ = [
    "Block",
    "Dataset",
    "JoinedRows",
    "ListedRows",
    "Row",
    "Rows",
    "SelectedRows",
    "checked_text",
]


@dataclass(frozen=True)
class Row:
    """One row of data.

    Args:
        fields: its values by the fields' names.
        place: where it is from, as in "rows.jsonl, line 7"; for messages.
        complaint: why it can't be read, if it can't.
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
            BadRowError: it is not, or there is no such field.
        """
        return checked_text(self[name], f"{self.place}: field {name!r}")


def checked_text(value: object, what: str) -> str:
    """Return `value`, which must be text that can be written as UTF-8.

    Args:
        value: anything.
        what: what it is called in messages.

    Raises:
        BadRowError: it is something else.
    """
    if not isinstance(value, str):
        raise BadRowError(f"{what} must be text, found {type(value).__name__} {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRowError(
            f"{what} holds half of a surrogate pair at character {error.start}, "
            "which is no text (an emoji that was cut in two, maybe)"
        ) from error
    return value


class Block(NamedTuple):
    """Rows that can only be read together, so that they are best used soon after each other.

    Attributes:
        file: the file they are in.
        number: which of its blocks they are.
        size: in bytes, about.
    """

    file: str
    number: int
    size: int


class Rows(Sequence[Row]):
    """Rows by their number. Slices are views: nothing is copied."""

    @abstractmethod
    def row(self, index: int) -> Row:
        """Return a row by its number, from 0 up to the number of rows."""

    @property
    def is_in_blocks(self) -> bool:
        """Whether some rows can only be read together with others."""
        return False

    def block(self, index: int) -> Block | None:
        """Return what is read together with a row; None where it is read alone."""
        return None

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> Rows: ...

    def __getitem__(self, index: int | slice) -> Row | Rows:
        if isinstance(index, slice):
            return SelectedRows(self, range(len(self))[index])
        return self.row(range(len(self))[index])


@dataclass(frozen=True)
class ListedRows(Rows):
    """Rows that are in memory."""

    rows: Sequence[Row]

    def row(self, index: int) -> Row:
        """Return a row by its number."""
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class SelectedRows(Rows):
    """Some rows of others, in an order of their own.

    Args:
        rows: those to select from.
        indices: the numbers of those selected.
    """

    rows: Sequence[Row]
    indices: Sequence[int]

    def row(self, index: int) -> Row:
        """Return a row by its number."""
        return self.rows[self.indices[index]]

    @property
    def is_in_blocks(self) -> bool:
        """Whether some rows can only be read together with others."""
        return isinstance(self.rows, Rows) and self.rows.is_in_blocks

    def block(self, index: int) -> Block | None:
        """Return what is read together with a row."""
        return self.rows.block(self.indices[index]) if isinstance(self.rows, Rows) else None

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class JoinedRows(Rows):
    """Sequences of rows, one after another."""

    parts: Sequence[Rows]
    ends: Sequence[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ends", tuple(accumulate(len(part) for part in self.parts)))

    def row(self, index: int) -> Row:
        """Return a row by its number."""
        rows, inner = self._part(index)
        return rows.row(inner)

    @property
    def is_in_blocks(self) -> bool:
        """Whether some rows can only be read together with others."""
        return any(part.is_in_blocks for part in self.parts)

    def block(self, index: int) -> Block | None:
        """Return what is read together with a row."""
        rows, inner = self._part(index)
        return rows.block(inner)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def _part(self, index: int) -> tuple[Rows, int]:
        part = bisect_right(self.ends, index)
        rows = self.parts[part]
        return rows, index - self.ends[part] + len(rows)


@dataclass(frozen=True)
class Dataset:
    """The rows to train on, and those held out to measure on (maybe none)."""

    training: Sequence[Row]
    held_out: Sequence[Row]
