"""Files of JSON that others have written: configurations, and indexes of checkpoints."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from disha.errors import AdapterFileError, AdapterIOError
from disha.files.tensors import explained

__all__ = ["LARGEST_CONFIG", "each_once", "read_json"]

LARGEST_CONFIG = 16 * 2**20
"""Bytes of a configuration that is read at all."""


def read_json(path: Path, largest: int = LARGEST_CONFIG) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: the file.
        largest: bytes that it may have.

    Raises:
        AdapterIOError: it can't be read.
        AdapterFileError: it is too large, is no JSON object, or names something twice.
    """
    if path.exists() and not path.is_file():  # opening a pipe waits for somebody to write into it
        raise AdapterIOError(f"can't read {path}: it is no regular file; check the path")
    with explained(path), open(path, "rb") as file:
        text = file.read(largest + 1)
    if len(text) > largest:
        raise AdapterFileError(
            f"{path} is larger than {largest:,} bytes, and what it is to hold never is; get it "
            "again"
        )
    try:
        content = json.loads(text, object_pairs_hook=each_once)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} is not valid JSON: {error}; get it again") from error
    if not isinstance(content, dict):
        raise AdapterFileError(
            f"{path} must hold a JSON object, holds a {type(content).__name__}; get it again"
        )
    return content


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object from its fields, for `json.loads`; raise ValueError if one repeats."""
    found = dict(pairs)
    if len(found) != len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} comes twice")
    return found
