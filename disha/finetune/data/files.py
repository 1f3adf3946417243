"""Data files of every format as rows; a file's name says its format.

    .jsonl .ndjson    a JSON object per line
    .json             a list of JSON objects, alone or as the one list in an object
    .csv .tsv         records, of which the first names the fields
    .parquet          a table
    .txt              a text per line, in the field `text`

All but Parquet may also be packed with gzip, as in rows.jsonl.gz.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from disha.finetune.data.parquet import ParquetRows
from disha.finetune.data.records import delimited_rows, json_line_rows, text_line_rows
from disha.finetune.data.rows import ListedRows, Row, Rows
from disha.finetune.data.storage import InMemory, OnDisk, Storage
from disha.finetune.errors import DataError

__all__ = ["file_format", "read_file"]

SUFFIXES: Mapping[str, str] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "txt",
}
PACKED = ".gz"

BY_RECORDS: Mapping[str, Callable[[Storage], Rows]] = {
    "jsonl": json_line_rows,
    "csv": lambda storage: delimited_rows(storage, ","),
    "tsv": lambda storage: delimited_rows(storage, "\t"),
    "txt": text_line_rows,
}


def file_format(path: Path) -> str | None:
    """The format that a file's name says, or None."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [PACKED]:
        inner = SUFFIXES.get(suffixes[-2]) if len(suffixes) > 1 else None
        return None if inner == "parquet" else inner
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


def read_file(path: Path, *, streaming: bool = False) -> Rows:
    """Return the rows of a file.

    Args:
        path: the file.
        streaming: leave rows on disk until they are asked for.

    Raises:
        DataError: the file can't be read, or not in that way. A single row that can't be read
            complains when its fields are asked for.
        MissingDependencyError: a package for this format is not installed.
    """
    kind = file_format(path)
    if kind is None:
        raise DataError(
            f"{path} has a name that says no known format; it must end with "
            f"{', '.join(SUFFIXES)} (all but .parquet maybe followed by {PACKED})"
        )
    if kind == "parquet":
        return ParquetRows(path)
    if streaming:
        _require_streamable(path, kind)
        return BY_RECORDS[kind](OnDisk(path))
    storage = InMemory.of(path)
    return _json_rows(storage) if kind == "json" else BY_RECORDS[kind](storage)


def _require_streamable(path: Path, kind: str) -> None:
    if path.suffix.lower() == PACKED:
        raise DataError(
            f"--streaming can't read {path}, as rows of a packed file can't be had one by one; "
            "unpack it, or leave --streaming out"
        )
    if kind == "json":
        raise DataError(
            f"--streaming can't read {path}, as JSON must be read whole; write it as JSON lines "
            "(.jsonl), or leave --streaming out"
        )


def _json_rows(storage: InMemory) -> Rows:
    path = storage.path
    content = storage.content.removeprefix(codecs.BOM_UTF8)
    try:
        value = json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason})") from error
    except (ValueError, RecursionError) as error:
        if _begins_with_json_line(content):
            return json_line_rows(storage)
        raise DataError(
            f"{path} is not JSON ({error}); it must hold a list of objects, or an object per line"
        ) from error
    rows = _list_of_rows(value, path)
    return ListedRows([_listed_row(row, f"{path}, row {i}") for i, row in enumerate(rows, 1)])


def _begins_with_json_line(content: bytes) -> bool:
    line = content.lstrip().split(b"\n", 1)[0]
    try:
        return isinstance(json.loads(line), dict)
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
    return next(iter(lists.values()), [value])  # without a list, it is one row


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _listed_row(value: Any, place: str) -> Row:
    if isinstance(value, dict):
        return Row(value, place)
    kind = type(value).__name__
    return Row({}, place, f"{place} holds a JSON {kind}; every row must be a JSON object")
