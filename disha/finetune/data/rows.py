"""Files of rows, as sequences of rows of text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from disha.finetune.data.sources import permutation
from disha.finetune.errors import DataError

__all__ = ["Dataset", "Pair", "read_pairs", "split_held_out"]


@dataclass(frozen=True)
class Pair:
    """A text to answer and the answer to learn."""

    query: str
    response: str


@dataclass(frozen=True)
class Dataset:
    """The rows to train on, and those held out to measure on (maybe none)."""

    training: tuple[Pair, ...]
    held_out: tuple[Pair, ...]


def read_pairs(path: Path, fields: tuple[str, str]) -> list[Pair]:
    """Read a JSON-lines file: one object per line, blank lines ignored.

    Args:
        path: the file, UTF-8.
        fields: names of the query's and the response's field.

    Raises:
        DataError: the file is missing, unreadable or holds no row, or a row is not as it must be;
            the message names file and line.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:  # with or without a byte-order mark
            pairs = [
                _pair(line, fields, f"{path}, line {number}")
                for number, line in enumerate(file, start=1)
                if line.strip()
            ]
    except FileNotFoundError as error:
        raise DataError(f"there is no data file {path}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}); JSON lines must be") from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}") from error
    if not pairs:
        raise DataError(f"{path} holds no rows; it must hold one JSON object per line")
    return pairs


def _pair(line: str, fields: tuple[str, str], place: str) -> Pair:
    row = _row(line, place)
    query, response = (_text(row, field, place) for field in fields)
    if not response.strip():
        raise DataError(f"{place}: field {fields[1]!r} is empty, so there is nothing to learn")
    return Pair(query, response)


def _row(line: str, place: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{place} is not JSON ({error}); every line must hold one JSON object"
        ) from error
    if not isinstance(row, dict):
        raise DataError(
            f"{place} holds a JSON {type(row).__name__}; every line must hold one JSON object"
        )
    return row


def _text(row: dict[str, object], field: str, place: str) -> str:
    if field not in row:
        found = ", ".join(repr(name) for name in row) or "none"
        raise DataError(
            f"{place} has no field {field!r}; its fields are: {found} "
            "(--dataset_field names the two to use)"
        )
    value = row[field]
    if not isinstance(value, str):
        raise DataError(
            f"{place}: field {field!r} must be text, found {type(value).__name__} {value!r:.60}"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: field {field!r} holds half of a surrogate pair at character {error.start}, "
            "which is no text (an emoji that was cut in two, maybe)"
        ) from error
    return value


def split_held_out(pairs: Sequence[Pair], fraction: float, seed: int) -> Dataset:
    """Set a random part of the rows aside, both parts in their original order.

    Args:
        pairs: all rows.
        fraction: how much to hold out, from 0 up to but not including 1; rounded to whole rows,
            at least one unless 0.
        seed: decides which.

    Raises:
        DataError: nothing would be left to train on.
    """
    if fraction == 0:
        return Dataset(training=tuple(pairs), held_out=())
    count = max(1, round(len(pairs) * fraction))
    if count >= len(pairs):
        raise DataError(
            f"holding out {fraction:g} of {len(pairs)} rows leaves none to train on; "
            "give more rows or a smaller --eval_fraction"
        )
    chosen = set(permutation(len(pairs), seed)[:count])
    return Dataset(
        training=tuple(pair for index, pair in enumerate(pairs) if index not in chosen),
        held_out=tuple(pair for index, pair in enumerate(pairs) if index in chosen),
    )
