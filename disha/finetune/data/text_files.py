"""Reads rows of text files, one after another, so that a file may be larger than memory.

A row keeps exactly its own fields and values. Readers of columns, such as pyarrow's, would give it
the fields of all other rows, guess dates, and refuse the file because of one row of another type.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from disha.finetune.data.rows import Row, RowFile, require_names_once
from disha.finetune.data.stamp import Stamp, opened
from disha.finetune.errors import BadRowError, DataError

__all__ = ["TextRows", "csv_rows", "json_line_rows", "json_rows", "text_line_rows"]

LONGEST_FIELD = 2**31 - 1
"""The limit of a field of a CSV file. The csv module has a lower one, for the whole process."""

UNPACKED_FREELY = 64 * 2**20
"""How many bytes any packed file may give."""

LARGEST_RATIO = 100
"""How many bytes each byte of a packed file may give, beyond `UNPACKED_FREELY`. Text gives 3 to 20.
A file that was made to do harm gives a thousand."""

LONGEST_LINE = 64 * 2**20
"""In bytes. The whole line is in memory."""

Records: TypeAlias = Callable[[Iterable[bytes]], Iterator[tuple[int, Any]]]
"""Cuts lines into records, and yields each with the number of its first line, from 1."""


class TextRows:
    """The rows of a file of UTF-8 text, with or without a byte-order mark.

    Args:
        path: the file; it is unpacked if its name ends with .gz.
        records: cuts its lines into records, one for each row.
        fields: turns a record into fields, or raises `BadRowError`.

    Raises:
        DataError: the file can't be read.
    """

    def __init__(
        self, path: Path, records: Records, fields: Callable[[Any], Mapping[str, Any]]
    ) -> None:
        self._path, self._records, self._fields = path, records, fields
        with opened(path) as file:
            self._stamp = Stamp.of(file)
            self._count = sum(1 for _ in records(_lines(_unpacked(file, path), path)))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Row]:
        with opened(self._path, self._stamp) as file:
            for number, record in self._records(_lines(_unpacked(file, self._path), self._path)):
                yield self._row(f"{self._path}, line {number}", record)

    def _row(self, place: str, record: Any) -> Row:
        try:
            return Row(self._fields(record), place)
        except UnicodeError as error:
            return Row({}, place, f"{place} is not UTF-8 text ({getattr(error, 'reason', error)})")
        except BadRowError as error:
            return Row({}, place, f"{place} {error}")


def json_line_rows(path: Path) -> TextRows:
    """Return a row for every line that is not blank; each line is a JSON object."""
    return TextRows(path, _filled_lines, _json_fields)


def text_line_rows(path: Path) -> TextRows:
    """Return a row for every line that is not blank, with its text in the field `text`."""
    return TextRows(path, _filled_lines, _text_fields)


def csv_rows(path: Path, delimiter: str) -> TextRows:
    """Return a row for every record after the first one, which names the fields.

    Raises:
        DataError: there is no first record, or it can't be used.
    """
    return TextRows(path, partial(_csv_records, path=path, delimiter=delimiter), _csv_fields)


# --- lines ---------------------------------------------------------------------------------------


def _lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Yield every line. Only a line feed ends a line."""
    is_first = True
    while line := file.readline(LONGEST_LINE + 1):
        if is_first and line[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise DataError(f"{path} is UTF-16, and must be UTF-8; save it as UTF-8")
        if len(line) > LONGEST_LINE:
            raise DataError(
                f"{path} has a line of more than {LONGEST_LINE:,} bytes; write each row on its own "
                "line"
            )
        yield line.removeprefix(codecs.BOM_UTF8) if is_first else line
        is_first = False


def _unpacked(file: io.FileIO, path: Path) -> BinaryIO:
    """Return what is in a file, unpacked if its name ends with .gz."""
    return io.BufferedReader(_Unpacking(file, path) if path.suffix.lower() == ".gz" else file)


class _Unpacking(io.RawIOBase):
    """The content of a packed file, as long as it is not far larger than the file."""

    def __init__(self, file: io.FileIO, path: Path) -> None:
        self._file, self._path, self._size = file, path, 0
        self._content = gzip.GzipFile(fileobj=file)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            piece = self._content.read(len(buffer))
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{self._path} is damaged and can't be unpacked: {error}") from error
        self._size += len(piece)
        if self._size > UNPACKED_FREELY + LARGEST_RATIO * self._file.tell():
            raise DataError(
                f"{self._path} unpacks to more than {LARGEST_RATIO} times its size; unpack it "
                "yourself if you trust it"
            )
        buffer[: len(piece)] = piece
        return len(piece)


def _filled_lines(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _text_fields(line: bytes) -> Mapping[str, Any]:
    return {"text": line.decode().removesuffix("\n").rstrip("\r")}


def _json_fields(line: bytes) -> Mapping[str, Any]:
    text = line.decode()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"is not JSON ({error}); every line must hold one JSON object") from error
    if not isinstance(value, dict):
        raise BadRowError(
            f"holds a JSON {type(value).__name__}; every line must hold one JSON object"
        )
    return value


# --- records of CSV files ------------------------------------------------------------------------


def _csv_records(
    lines: Iterable[bytes], path: Path, delimiter: str
) -> Iterator[tuple[int, tuple[Sequence[str], Sequence[str] | csv.Error]]]:
    """Yield records with the names of their fields, or what is wrong with a record."""
    # If a row is not UTF-8, only this row is bad.
    decoded = (line.decode("utf-8", "surrogateescape") for line in lines)
    reader = csv.reader(decoded, delimiter=delimiter, strict=True)
    header = _header(reader, path)
    while True:
        first, record = reader.line_num + 1, _next(reader)
        if record is None:
            return
        if isinstance(record, csv.Error) or not _is_blank(record):
            yield first, (header, record)


def _next(reader: Iterator[list[str]]) -> list[str] | csv.Error | None:
    limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        return next(reader, None)
    except csv.Error as error:
        return error
    finally:
        csv.field_size_limit(limit)


def _header(reader: Iterator[list[str]], path: Path) -> tuple[str, ...]:
    try:
        header = tuple(next((record for record in reader if not _is_blank(record)), ()))
        "".join(header).encode()
    except (csv.Error, UnicodeEncodeError) as error:
        raise DataError(f"{path}, line 1 can't be read as names of fields: {error}") from error
    if not header:
        raise DataError(f"{path} holds no rows; its first line must name the fields")
    require_names_once(header, path)
    return header


def _is_blank(record: Sequence[str]) -> bool:
    return not record or (len(record) == 1 and not record[0].strip())


def _csv_fields(record: tuple[Sequence[str], Sequence[str] | csv.Error]) -> Mapping[str, Any]:
    header, values = record
    if isinstance(values, csv.Error):
        raise BadRowError(f"can't be read: {values}")
    "".join(values).encode()
    if len(values) != len(header):
        raise BadRowError(f"has {len(values)} fields, where the header names {len(header)}")
    return dict(zip(header, values, strict=True))


# --- rows of JSON files --------------------------------------------------------------------------


def json_rows(path: Path) -> RowFile:
    """Return a row for every object of a list, or for every line if each holds an object.

    Raises:
        DataError: the file holds something else.
    """
    with opened(path) as file:
        content = _unpacked(file, path).read().removeprefix(codecs.BOM_UTF8)
    try:
        value = json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason})") from error
    except (ValueError, RecursionError) as error:
        if _begins_with_json_line(content):
            return json_line_rows(path)
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
