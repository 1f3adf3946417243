"""Which data files there are, and which splits they belong to.

In a folder, a file belongs to the split that its name begins with, or else the name of a folder
around it: `train-part1.jsonl`, `test.csv`, `validation/rows.parquet`. Shards belong to the split
before their number, whatever it is called: `extra-00000-of-00002.parquet`. All other files belong
to `train`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from disha.finetune.data.files import file_format
from disha.finetune.data.splits import split_name
from disha.finetune.errors import DataError

__all__ = ["find_files"]

DEFAULT = "train"
SHARD = re.compile(r"(?P<name>[\w.-]+?)-\d+-of-\d+")
LEADING_WORD = re.compile(r"[a-z]+", re.IGNORECASE)
USUAL = ("train", "test", "validation")


def find_files(path: Path) -> Mapping[str, Sequence[Path]]:
    """Return the data files at a path, by split.

    Args:
        path: a file, which is the split `train` and also the one that its name says; or a folder.

    Raises:
        DataError: there is nothing, or no data file in it.
    """
    if path.is_file():
        return {name: [path] for name in (DEFAULT, _split_of_name(path.name)) if name}
    if not path.exists():
        raise DataError(f"there is no data file {path}")
    splits: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        inside = file.relative_to(path)
        is_hidden = any(part.startswith(".") for part in inside.parts)
        if not is_hidden and file_format(file) is not None and file.is_file():
            splits.setdefault(_split_of(inside), []).append(file)
    if not splits:
        raise DataError(
            f"{path} holds no data files; their names must end with .jsonl, .json, .csv, .tsv, "
            ".parquet or .txt"
        )
    return splits


def _split_of(file: Path) -> str:
    names = (_split_of_name(part) for part in reversed(file.parts))
    return next((name for name in names if name), DEFAULT)


def _split_of_name(name: str) -> str | None:
    shard = SHARD.match(name)
    if shard is not None:
        return split_name(shard["name"])
    word = LEADING_WORD.match(name)
    usual = split_name(word[0]) if word is not None else None
    return usual if usual in USUAL else None
