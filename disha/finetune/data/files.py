"""Reads data files as rows. The ending of a file's name gives its format.

    .jsonl .ndjson    a JSON object per line
    .json             a list of JSON objects, or an object that holds one such list
    .csv .tsv         records; the first one names the fields
    .parquet          a table
    .txt              a text per line, in the field `text`

All formats but Parquet may also be packed with gzip, as in rows.jsonl.gz.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from disha.finetune.data.parquet import ParquetRows
from disha.finetune.data.rows import RowFile
from disha.finetune.data.text_files import (
    TextFile,
    csv_rows,
    json_line_rows,
    json_rows,
    text_line_rows,
)
from disha.finetune.errors import DataError

__all__ = ["file_format", "read_file"]

READERS: Mapping[str, Callable[[TextFile], RowFile]] = {
    ".jsonl": json_line_rows,
    ".ndjson": json_line_rows,
    ".json": json_rows,
    ".csv": lambda file: csv_rows(file, ","),
    ".tsv": lambda file: csv_rows(file, "\t"),
    ".txt": text_line_rows,
}
PARQUET, PACKED = ".parquet", ".gz"


def file_format(path: Path) -> str | None:
    """Return the ending of a file's name that gives its format, or None."""
    packed = path.suffix.lower() == PACKED
    suffix = (Path(path.stem) if packed else path).suffix.lower()
    return suffix if suffix in READERS or (suffix == PARQUET and not packed) else None


def read_file(path: Path, *, streaming: bool = False) -> RowFile:
    """Return the rows of a file.

    Args:
        path: the file.
        streaming: leave rows on disk until they are asked for.

    Raises:
        DataError: the file can't be read, or can't be streamed. A single row that can't be read
            raises only when its fields are asked for.
        MissingPackageError: a package for this format is not installed.
    """
    found = file_format(path)
    if found is None:
        raise DataError(
            f"the name of {path} gives no known format; it must end with {', '.join(READERS)} "
            f"(maybe with {PACKED} after it) or {PARQUET}"
        )
    if found == PARQUET:
        return ParquetRows(path)
    if streaming:
        _require_streamable(path, found)
    return READERS[found](TextFile.open(path, streaming=streaming))


def _require_streamable(path: Path, found: str) -> None:
    if path.suffix.lower() == PACKED:
        raise DataError(
            f"--streaming can't read {path}, because packed files can't be read row by row; "
            "unpack it, or leave --streaming out"
        )
    if found == ".json":
        raise DataError(
            f"--streaming can't read {path}, because JSON files can't be read row by row; write it "
            "as JSON lines (.jsonl), or leave --streaming out"
        )
