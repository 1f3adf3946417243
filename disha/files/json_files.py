"""Read JSON objects: headers of adapter files, and configurations of other libraries."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from disha.errors import AdapterFileError
from disha.files.reading import opened_file

__all__ = ["LARGEST_CONFIG", "parsed_json", "read_json"]

LARGEST_CONFIG = 16 * 2**20
"""Largest size of a configuration in bytes."""


def read_json(path: Path, largest: int = LARGEST_CONFIG) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: the file.
        largest: the largest allowed size in bytes.

    Raises:
        AdapterIOError: it can't be read.
        AdapterFileError: it is too large, or not a JSON object, or has a name twice.
    """
    with opened_file(path) as file:
        text = file.read(largest + 1)
    if len(text) > largest:
        raise AdapterFileError(
            f"{path} is larger than {largest:,} bytes, which no such file should be; get it again"
        )
    return parsed_json(str(path), text)


def parsed_json(what: str, text: str | bytes, *, strict: bool = False) -> dict[str, Any]:
    """Return a JSON object from its text.

    Args:
        what: the name of the text in errors.
        text: the text.
        strict: refuse what only Python allows: `NaN`, `Infinity`, and half of a surrogate pair.
            Configurations of models contain such numbers.

    Raises:
        AdapterFileError: it is not valid JSON, or not an object, or has a name twice.
    """
    constant = _no_number if strict else float
    try:
        content = json.loads(text, object_pairs_hook=_each_once, parse_constant=constant)
        if strict and "\\u" in str(text):  # an escape can write half of a surrogate pair
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{what} is not valid JSON: {error}; get the file again") from error
    if not isinstance(content, dict):
        raise AdapterFileError(
            f"{what} must be a JSON object; it is a {type(content).__name__}; get the file again"
        )
    return content


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} comes twice")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")
