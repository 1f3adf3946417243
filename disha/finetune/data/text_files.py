"""Reads rows of text files by an index.

The index says where each row begins. It is made in one pass when a file is opened, and takes 16
bytes a row. Then any row can be read at any time, and only that row is read. A row keeps exactly
its own fields and values. Column readers, such as pyarrow's, would give it the fields of all other
rows, guess dates, and refuse the file because of one row of another type.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from disha.finetune.data.rows import Row, RowFile
from disha.finetune.data.stamp import Stamp, opened
from disha.finetune.errors import BadRowError, DataError

__all__ = ["TextFile", "TextRows", "csv_rows", "json_line_rows", "json_rows", "text_line_rows"]

LONGEST_FIELD = 2**31 - 1
"""For a field of a CSV file; the csv module's own limit, for the whole process, is 128 KiB."""

PIECE = 2**20
UNPACKED_FREELY = 64 * 2**20
LARGEST_RATIO = 100
"""How many bytes each byte of a packed file may give, beyond `UNPACKED_FREELY`. Text gives 3 to 20.
A file that was made to do harm gives a thousand."""

LONGEST_LINE = 64 * 2**20
"""In bytes. A line is in memory whole, whatever --streaming says."""

Parse: TypeAlias = Callable[[str], Mapping[str, Any]]


@dataclass(frozen=True)
class TextFile:
    """A file of UTF-8 text, with or without a byte-order mark.

    Args:
        path: the file.
        stamp: the file's stamp when it was opened.
        content: its bytes, unpacked; None leaves them on disk.
    """

    path: Path
    stamp: Stamp
    content: bytes | None

    @classmethod
    def open(cls, path: Path, *, streaming: bool) -> TextFile:
        """Open a file, and unpack it if its name ends with .gz; streaming leaves it on disk.

        Raises:
            DataError: it can't be read.
        """
        with opened(path) as file:
            stamp = Stamp.of(file)
            if streaming:
                content = None
            elif path.suffix.lower() == ".gz":
                content = _unpacked(file, path)
            else:
                content = file.read()
        return cls(path, stamp, content)

    def read(self, start: int, end: int | None) -> bytes:
        """Return the bytes from `start` up to `end`; None means the end of the file."""
        if self.content is not None:
            return self.content[start:end]
        with self._opened() as file:
            file.seek(start)
            return file.read(-1 if end is None else end - start)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield every line with the place of its first byte. Only a line feed ends a line."""
        with self._opened() as file:
            mark = file.read(len(codecs.BOM_UTF8))
            if mark[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise DataError(f"{self.path} is UTF-16, and must be UTF-8; save it as UTF-8")
            start = len(mark) if mark == codecs.BOM_UTF8 else 0
            file.seek(start)
            while line := file.readline(LONGEST_LINE + 1):
                if len(line) > LONGEST_LINE:
                    raise DataError(
                        f"{self.path} has a line of more than {LONGEST_LINE:,} bytes; write a row "
                        "to a line of its own"
                    )
                yield start, line
                start += len(line)

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        # Each row opens the file again. An open file would share its position with forked
        # processes, and can't be sent to other processes.
        if self.content is not None:
            yield io.BytesIO(self.content)
            return
        with opened(self.path, self.stamp) as file:
            yield io.BufferedReader(file)


def _unpacked(file: BinaryIO, path: Path) -> bytes:
    content = bytearray()
    try:
        with gzip.GzipFile(fileobj=file) as unpacked:
            while piece := unpacked.read(PIECE):
                content += piece
                if len(content) > UNPACKED_FREELY + LARGEST_RATIO * file.tell():
                    raise DataError(
                        f"{path} unpacks to more than {LARGEST_RATIO} times its size; unpack it "
                        "yourself if you trust it"
                    )
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged and can't be unpacked: {error}") from error
    return bytes(content)


# --- rows of text files --------------------------------------------------------------------------


@dataclass(frozen=True)
class TextRows:
    """The rows of a text file.

    Args:
        file: the file.
        parse: turns a row's text into fields, or raises `BadRowError`.
        starts: the place of each row's first byte.
        lines: the number of each row's first line, from 1.
    """

    file: TextFile
    parse: Parse
    starts: array[int] = field(default_factory=lambda: array("Q"))
    lines: array[int] = field(default_factory=lambda: array("Q"))

    @property
    def path(self) -> Path:
        """The file's path."""
        return self.file.path

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Row:
        """Return a row by its number, from 0."""
        following = index + 1
        end = self.starts[following] if following < len(self) else None
        place = f"{self.file.path}, line {self.lines[index]}"
        record = self.file.read(self.starts[index], end)
        try:
            return Row(self.parse(record.decode()), place)
        except UnicodeDecodeError as error:
            return Row({}, place, f"{place} is not UTF-8 text ({error.reason})")
        except BadRowError as error:
            return Row({}, place, f"{place} {error}")

    def add(self, start: int, line: int) -> None:
        """Note where a row begins."""
        self.starts.append(start)
        self.lines.append(line)


def json_line_rows(file: TextFile) -> TextRows:
    """Return a row for every line that is not blank; each line is a JSON object."""
    return _line_rows(file, _json_fields)


def text_line_rows(file: TextFile) -> TextRows:
    """Return a row for every line that is not blank, with its text in the field `text`."""
    return _line_rows(file, _text_fields)


def _line_rows(file: TextFile, parse: Parse) -> TextRows:
    rows = TextRows(file, parse)
    for number, (start, line) in enumerate(file.lines(), 1):
        if line.strip():
            rows.add(start, number)
    return rows


def _first_line(record: str) -> str:
    return record.split("\n", 1)[0]  # blank lines may follow


def _text_fields(record: str) -> Mapping[str, Any]:
    return {"text": _first_line(record).rstrip("\r")}


def _json_fields(record: str) -> Mapping[str, Any]:
    try:
        value = json.loads(_first_line(record))
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"is not JSON ({error}); every line must hold one JSON object") from error
    if not isinstance(value, dict):
        raise BadRowError(
            f"holds a JSON {type(value).__name__}; every line must hold one JSON object"
        )
    return value


def csv_rows(file: TextFile, delimiter: str) -> TextRows:
    """Return a row for every record after the first one, which names the fields.

    Raises:
        DataError: there is no first record, or it can't be used.
    """
    starts = array("Q")  # of all lines

    def decoded() -> Iterator[str]:
        for start, line in file.lines():
            starts.append(start)
            # A row that is not UTF-8 raises when it is read.
            yield line.decode("utf-8", "surrogateescape")

    with _fields_of_any_length():
        reader = csv.reader(decoded(), delimiter=delimiter, strict=True)
        rows = TextRows(file, partial(_csv_fields, _header(reader, file.path), delimiter))
        while True:
            line = reader.line_num
            try:
                is_row = not _is_blank(next(reader))
            except StopIteration:
                return rows
            except csv.Error:
                is_row = True  # it raises when it is read
            if is_row:
                rows.add(starts[line], line + 1)


def _header(reader: Iterator[list[str]], path: Path) -> tuple[str, ...]:
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


def _is_blank(record: Sequence[str]) -> bool:
    return not record or (len(record) == 1 and not record[0].strip())


def _csv_fields(header: tuple[str, ...], delimiter: str, record: str) -> Mapping[str, Any]:
    lines = io.StringIO(record, newline="\n")
    try:
        with _fields_of_any_length():
            values = next(csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise BadRowError(f"can't be read: {error}") from error
    if len(values) != len(header):
        raise BadRowError(f"has {len(values)} fields, where the header names {len(header)}")
    return dict(zip(header, values, strict=True))


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


# --- rows of JSON files --------------------------------------------------------------------------


def json_rows(file: TextFile) -> RowFile:
    """Return a row for every object of a list, or for every line if each holds an object.

    Raises:
        DataError: the file holds something else.
    """
    path = file.path
    content = file.read(0, None).removeprefix(codecs.BOM_UTF8)
    try:
        value = json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason})") from error
    except (ValueError, RecursionError) as error:
        if _begins_with_json_line(content):
            return json_line_rows(file)
        raise DataError(
            f"{path} is not JSON ({error}); it must hold a list of objects, or an object per line"
        ) from error
    return [
        _listed_row(row, f"{path}, row {number}")
        for number, row in enumerate(_list_of_rows(value, path), 1)
    ]


def _begins_with_json_line(content: bytes) -> bool:
    try:
        return isinstance(json.loads(content.lstrip().split(b"\n", 1)[0]), dict)
    except (ValueError, RecursionError):
        return False


def _list_of_rows(value: Any, path: Path) -> list[Any]:
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise DataError(
            f"{path} holds a JSON {type(value).__name__}; it must hold a list of objects"
        )
    lists = {name: inner for name, inner in value.items() if _is_list_of_objects(inner)}
    if len(lists) > 1:
        raise DataError(
            f"{path} holds several lists of objects: {', '.join(map(repr, lists))}; "
            "write the one to use to a file of its own"
        )
    return next(iter(lists.values()), [value])  # an object without a list is one row


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _listed_row(value: Any, place: str) -> Row:
    if isinstance(value, dict):
        return Row(value, place)
    found = type(value).__name__
    return Row({}, place, f"{place} holds a JSON {found}; every row must be a JSON object")
