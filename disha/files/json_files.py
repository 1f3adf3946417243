"""Read JSON objects: headers of adapter files, and configurations of other libraries."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

from disha.errors import AdapterFileError
from disha.files.reading import LARGEST_TEXT, read_bytes

__all__ = ["is_size", "parsed_json", "read_json"]

MOST_LEVELS = 100
"""Most lists and objects inside each other. Python can't show thousands of them."""

MOST_PARTS = 1_000_000
"""Most lists and objects in one text. In memory, an empty one takes 30 times its two characters."""


def read_json(path: Path, largest: int = LARGEST_TEXT) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: the file.
        largest: the largest allowed size in bytes.

    Raises:
        AdapterIOError: it is not a regular file, or can't be read.
        AdapterFileError: it is too large, or not a JSON object, or has a name twice.
    """
    return parsed_json(str(path), read_bytes(path, largest))


def parsed_json(what: str, text: str | bytes, *, strict: bool = False) -> dict[str, Any]:
    """Return a JSON object from its text.

    Args:
        what: the name of the text in errors.
        text: the text.
        strict: refuse what only Python allows: `NaN` and `Infinity`. Configurations of models
            contain such numbers.

    Raises:
        AdapterFileError: it is not valid JSON, or not an object, or has a name twice, or too many
            parts.
    """
    constant = _no_number if strict else float
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        if text.count("{") + text.count("[") > MOST_PARTS:
            raise ValueError(f"it has more than {MOST_PARTS:,} lists and objects")
        content = json.loads(text, object_pairs_hook=_each_once, parse_constant=constant)
        if _is_deeper(content, MOST_LEVELS):
            raise ValueError(f"it has more than {MOST_LEVELS} lists and objects inside each other")
        if "\\u" in text:
            _require_whole_characters(content)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{what} is not valid JSON: {error}; get the file again") from error
    if not isinstance(content, dict):
        raise AdapterFileError(
            f"{what} must be a JSON object; it is a {type(content).__name__}; get the file again"
        )
    return content


def is_size(value: object) -> bool:
    """Whether a value of JSON is an integer from 1 to 2^31 - 1. `true` is no integer.

    Args:
        value: any value.
    """
    return type(value) is int and 1 <= value < 2**31


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} comes twice")
    return found


def _is_deeper(content: object, levels: int) -> bool:
    """Whether lists and objects are nested deeper than this number of levels."""
    inside = [content]
    for _ in range(levels + 1):
        whole = [part for part in inside if isinstance(part, (dict, list))]
        if not whole:
            return False
        inside = list(chain(*(part.values() if isinstance(part, dict) else part for part in whole)))
    return True


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def _require_whole_characters(content: object) -> None:
    """Raise `ValueError` if an escape in JSON wrote half of a surrogate pair."""
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("a text in it holds half of a surrogate pair") from error
