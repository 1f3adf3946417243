"""Reads data files as rows. The end of a file's name says which format it has.

    .jsonl .ndjson    a JSON object per line
    .json             a list of JSON objects, or an object that holds one such list
    .csv .tsv         records; the first one names the fields
    .parquet          a table
    .txt              a text per line, in the field `text`

All formats except Parquet may also be packed with gzip, as in rows.jsonl.gz. Only a few rows are in
memory at a time, except for JSON files, which are read whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from disha.finetune.data.parquet import ParquetRows
from disha.finetune.data.rows import RowFile
from disha.finetune.data.text_files import csv_rows, json_line_rows, json_rows, text_line_rows
from disha.finetune.errors import DataError

__all__ = ["file_format", "read_file"]

READERS: Mapping[str, Callable[[Path], RowFile]] = {
    ".jsonl": json_line_rows,
    ".ndjson": json_line_rows,
    ".json": json_rows,
    ".csv": lambda path: csv_rows(path, ","),
    ".tsv": lambda path: csv_rows(path, "\t"),
    ".txt": text_line_rows,
    ".parquet": ParquetRows,
}
PARQUET, PACKED = ".parquet", ".gz"


def file_format(path: Path) -> str | None:
    """Return the end of a file's name that says which format it has; None if it says nothing."""
    packed = path.suffix.lower() == PACKED
    suffix = (Path(path.stem) if packed else path).suffix.lower()
    return suffix if suffix in READERS and not (suffix == PARQUET and packed) else None


def read_file(path: Path) -> RowFile:
    """Return the rows of a file.

    Args:
        path: the file.

    Raises:
        DataError: the file can't be read. A single row that can't be read raises only when its
            fields are asked for.
        MissingPackageError: a package for this format is not installed.
    """
    found = file_format(path)
    if found is None:
        texts = ", ".join(name for name in READERS if name != PARQUET)
        raise DataError(
            f"the name of {path} must end with {PARQUET}, or with {texts} (and may then have "
            f"{PACKED} after it)"
        )
    return READERS[found](path)
