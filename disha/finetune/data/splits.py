"""Reads the notation for splits, and finds the files of each split.

    train                       all rows of the split "train"
    train[:100000]              its first 100000 rows
    train[10:20], train[-5%:]   a range, in rows or in percent
    train[:10%]+train[90%:]     several ranges, one after another

Percentages are rounded to the nearest row, and halves to the even row, as in upstream's data
library. So `train[:k%]` and `train[k%:]` share no row and leave none out.

In a folder, the name of a file, or of a folder around it, begins with the name of its split:
`train-part1.jsonl`, `test.csv`, `validation/rows.parquet`. The name of a numbered part begins with
its split, which may have any name: `extra-00000-of-00002.parquet`. All other files belong to
`train`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from disha.finetune.data.files import file_format
from disha.finetune.errors import DataError

__all__ = ["SplitPart", "find_files", "parse_split", "split_name"]

PART = re.compile(r"\s*([\w.-]+?)\s*(?:\[\s*([^:\]]*?)\s*:\s*([^:\]]*?)\s*\]\s*)?")
BOUND = re.compile(
    r"(?P<sign>-?)\s*(?:(?P<rows>\d[\d_]{0,17})|(?P<percent>\d{1,18}(\.\d{1,9})?)\s*%)"
)

ALIASES = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
}
NAMES = {alias: name for name, aliases in ALIASES.items() for alias in aliases}
"""A word that a name may begin with -> the split that it means."""

NUMBERED_PART = re.compile(r"([\w.-]+?)-\d+-of-\d+")
LEADING_WORD = re.compile(r"[a-z]+", re.IGNORECASE)


@dataclass(frozen=True)
class SplitPart:
    """Rows of one split.

    Args:
        name: the name of the split.
        start: the first row, as the user wrote it: in rows or percent, maybe with a minus. An empty
            text means the beginning.
        end: the row after the last one, as the user wrote it. An empty text means the end.
    """

    name: str
    start: str
    end: str

    def of(self, rows: range) -> range:
        """Return this part of all the rows of the split."""
        start = _row(self.start, len(rows)) if self.start else 0
        end = _row(self.end, len(rows)) if self.end else len(rows)
        return rows[start : max(start, end)]


def parse_split(text: str) -> list[SplitPart]:
    """Read a split, such as ``train[:100]+test``.

    Raises:
        DataError: the text is not a split; the message shows what is allowed.
    """
    parts = []
    for part in text.split("+"):
        match = PART.fullmatch(part)
        bounds = [] if match is None else [bound for bound in match.groups()[1:] if bound]
        if match is None or not all(map(BOUND.fullmatch, bounds)):
            raise DataError(
                f"{text!r} is not a split; it must be a name, maybe with a range of rows or "
                "percent, as in train, train[:1000], train[10:20], train[-5%:] or train[10%:30%], "
                "or several with + between them"
            )
        parts.append(SplitPart(match[1], match[2] or "", match[3] or ""))
    return parts


def split_name(name: str) -> str:
    """Return the usual name of a split, such as validation for dev."""
    return NAMES.get(name.lower(), name)


def find_files(path: Path) -> Mapping[str, Sequence[Path]]:
    """Return the data files at a path, by split.

    Args:
        path: a folder or a file. A file is the split `train`, and also the split in its name.

    Raises:
        DataError: the path does not exist, or holds no data file.
    """
    if path.exists() and not path.is_dir():
        return {name: [path] for name in ("train", _split_of(path.name)) if name}
    if not path.exists():
        raise DataError(f"there is no data file {path}")
    splits: dict[str, list[Path]] = {}
    for file in sorted(_files_in(path)):
        if file_format(file) is not None and file.is_file():
            names = filter(None, map(_split_of, reversed(file.relative_to(path).parts)))
            splits.setdefault(next(names, "train"), []).append(file)
    if not splits:
        raise DataError(
            f"{path} holds no data files; their names must end with .jsonl, .json, .csv, .tsv, "
            ".parquet or .txt"
        )
    return splits


def _files_in(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder that are not hidden, also those behind links to other folders."""
    root, seen = folder.resolve(), set[Path]()
    for name, folders, files in os.walk(folder, followlinks=True):
        here = Path(name)
        real = here.resolve()
        # A link that stays in the folder would give the same files again, or have no end.
        is_double = real.is_relative_to(root) and real != root / here.relative_to(folder)
        if is_double or real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [one for one in folders if not one.startswith(".")]
        yield from (here / one for one in files if not one.startswith("."))


def _split_of(name: str) -> str | None:
    part = NUMBERED_PART.match(name)
    if part is not None:
        return split_name(part[1])
    word = LEADING_WORD.match(name)
    return None if word is None else NAMES.get(word[0].lower())


def _row(written: str, count: int) -> int:
    """Return the row, among `count` rows, where a slice begins or ends."""
    match = BOUND.fullmatch(written)
    assert match is not None
    if match["rows"] is None:
        rows = round(float(match["percent"]) * count / 100)
    else:
        rows = int(match["rows"].replace("_", ""))
    return max(0, count - rows) if match["sign"] else min(rows, count)
