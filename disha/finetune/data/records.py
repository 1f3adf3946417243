"""Rows of text files by their number: an index says where in the file each one begins.

The index takes 8 bytes a row (and 8 for every line that begins none), is made in one pass, and
makes a file on disk as good as a list: any row can be had at any time, and only that one is read.
"""

from __future__ import annotations

import csv
import io
import json
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from disha.finetune.data.rows import Row, Rows
from disha.finetune.data.storage import Storage
from disha.finetune.errors import DataError

__all__ = ["RecordRows", "delimited_rows", "json_line_rows", "text_line_rows"]

LONGEST_FIELD = 2**31 - 1  # the csv module's own limit is 128 KiB, for the whole process


@dataclass(frozen=True)
class Index:
    """Where rows begin.

    Args:
        starts: the place of each row's first byte.
        others: for every line that begins no row, how many rows begin before it.
    """

    starts: array[int] = field(default_factory=lambda: array("Q"))
    others: array[int] = field(default_factory=lambda: array("Q"))

    def line(self, row: int) -> int:
        """The number of a row's first line, from 1."""
        return 1 + row + bisect_right(self.others, row)

    def add_row(self, start: int) -> None:
        """Note a line that begins a row."""
        self.starts.append(start)

    def add_others(self, count: int) -> None:
        """Note lines that begin no row."""
        self.others.extend([len(self.starts)] * count)


@dataclass(frozen=True)
class RecordRows(Rows):
    """The rows of a text file.

    Args:
        storage: the file.
        begins: where its rows begin.
        parse: makes a row of the bytes from its beginning up to the next one's, and its place.
    """

    storage: Storage
    begins: Index
    parse: Callable[[bytes, str], Row]

    def row(self, index: int) -> Row:
        """Return a row by its number."""
        starts, following = self.begins.starts, index + 1
        end = starts[following] if following < len(starts) else self.storage.size
        place = f"{self.storage.path}, line {self.begins.line(index)}"
        return self.parse(self.storage.read(starts[index], end), place)

    def __len__(self) -> int:
        return len(self.begins.starts)


def json_line_rows(storage: Storage) -> RecordRows:
    """A row for every line that is not blank, a JSON object each."""
    return RecordRows(storage, _index_of_lines(storage), _json_row)


def text_line_rows(storage: Storage) -> RecordRows:
    """A row for every line that is not blank, its text in the field `text`."""
    return RecordRows(storage, _index_of_lines(storage), _text_row)


def delimited_rows(storage: Storage, delimiter: str) -> RecordRows:
    """A row for every record after the first, which names the fields.

    Raises:
        DataError: there is no first record, or it can't be used.
    """
    index = Index()
    with _fields_of_any_length():
        lines = _CountedLines(storage)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        header = _header(reader, storage)
        index.add_others(lines.count)
        while (is_row := _pass_record(reader, lines)) is not None:
            if is_row:
                index.add_row(lines.start)
            index.add_others(lines.count - is_row)
    return RecordRows(storage, index, partial(_delimited_row, header, delimiter))


class _CountedLines(Iterator[str]):
    """Lines, with a note of which were taken since the note was last cleared.

    Args:
        storage: where they are from.

    Attributes:
        start: the place of the first byte of the first line taken.
        count: how many were taken.
    """

    def __init__(self, storage: Storage) -> None:
        self.start = self.count = 0
        self._lines = storage.lines()

    def clear(self) -> None:
        """Forget which lines were taken."""
        self.start = self.count = 0

    def __next__(self) -> str:
        start, line = next(self._lines)
        if self.count == 0:
            self.start = start
        self.count += 1
        # What is not UTF-8 is a matter of its row, when that is read.
        return line.decode("utf-8", "surrogateescape")


def _pass_record(reader: Iterator[list[str]], lines: _CountedLines) -> bool | None:
    """Whether the next record is a row and no blank line; None after the last."""
    lines.clear()
    try:
        record = next(reader)
    except StopIteration:
        return None
    except csv.Error:
        return True  # it is read again, and complained about, when its turn comes
    return not _is_blank(record)


def _is_blank(record: Sequence[str]) -> bool:
    return not record or (len(record) == 1 and not record[0].strip())


def _header(reader: Iterator[list[str]], storage: Storage) -> tuple[str, ...]:
    path = storage.path
    try:
        header = tuple(next((record for record in reader if not _is_blank(record)), ()))
        "".join(header).encode()
    except (csv.Error, UnicodeEncodeError) as error:
        raise DataError(f"{path}, line 1 can't be read as names of fields: {error}") from error
    if not header:
        raise DataError(f"{path} holds no rows; its first line must name the fields")
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise DataError(f"{path} has several fields named {twice!r}; give each its own name")
    return header


def _delimited_row(header: tuple[str, ...], delimiter: str, record: bytes, place: str) -> Row:
    try:
        lines = io.StringIO(record.decode(), newline="\n")
        with _fields_of_any_length():
            values = next(csv.reader(lines, delimiter=delimiter, strict=True))
    except UnicodeDecodeError as error:
        return _not_text(place, error)
    except csv.Error as error:
        return Row({}, place, f"{place} can't be read: {error}")
    if len(values) != len(header):
        return Row(
            {}, place, f"{place} has {len(values)} fields, where the header names {len(header)}"
        )
    return Row(dict(zip(header, values, strict=True)), place)


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _index_of_lines(storage: Storage) -> Index:
    index = Index()
    for start, line in storage.lines():
        if line.strip():
            index.add_row(start)
        else:
            index.add_others(1)
    return index


def _first_line(record: bytes) -> bytes:
    return record.split(b"\n", 1)[0]  # blank lines may follow


def _json_row(record: bytes, place: str) -> Row:
    try:
        value = json.loads(_first_line(record).decode())
    except UnicodeDecodeError as error:
        return _not_text(place, error)
    except (ValueError, RecursionError) as error:
        return Row(
            {}, place, f"{place} is not JSON ({error}); every line must hold one JSON object"
        )
    if not isinstance(value, dict):
        kind = type(value).__name__
        return Row({}, place, f"{place} holds a JSON {kind}; every line must hold one JSON object")
    return Row(value, place)


def _text_row(record: bytes, place: str) -> Row:
    try:
        return Row({"text": _first_line(record).decode().rstrip("\r")}, place)
    except UnicodeDecodeError as error:
        return _not_text(place, error)


def _not_text(place: str, error: UnicodeDecodeError) -> Row:
    return Row({}, place, f"{place} is not UTF-8 text ({error.reason})")
