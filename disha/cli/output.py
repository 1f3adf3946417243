"""Print the results of commands: text for people, or one JSON object for scripts."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

from disha.errors import ArgumentError
from disha.text import printable

__all__ = ["advancing", "number", "printable_on", "require_free", "show", "with_progress"]

T = TypeVar("T")


def require_free(path: Path, overwrite: bool) -> None:
    """Raise if a file or a folder with content is at `path`, unless `overwrite` is set."""
    if overwrite or not path.exists():
        return
    if not path.is_dir():
        raise ArgumentError(f"{path} exists; choose another name, or give --overwrite")
    if any(path.iterdir()):
        raise ArgumentError(f"{path} is not empty; choose another folder, or give --overwrite")


def show(as_json: bool, text: str, fields: Mapping[str, Any]) -> None:
    """Print a result.

    Args:
        as_json: whether to print `fields` instead of `text`.
        text: the result for people.
        fields: the result for scripts; numbers that are not finite become null.
    """
    print(json.dumps(_finite(fields), indent=2) if as_json else printable_on(sys.stdout, text))


def printable_on(stream: TextIO, text: str) -> str:
    """Return a text with everything escaped that the stream or a terminal can't show."""
    encoding = stream.encoding or "utf-8"
    return (
        printable(text, len(text), lines=True).encode(encoding, "backslashreplace").decode(encoding)
    )


def number(value: float | None, digits: int) -> str:
    """Return a number as a cell of a table; a dash for None."""
    return "-" if value is None else f"{value:.{digits}g}"


def with_progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Iterate with a progress bar, which appears after a second and only on a terminal.

    Args:
        items: the items.
        total: their number.
        what: the label of the bar.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    yield from tqdm(items, what, total, **_BAR)


@contextmanager
def advancing(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that shows progress in bytes, called with the bytes done and in total.

    Args:
        what: the label of the bar.
    """
    from tqdm import tqdm

    with tqdm(desc=what, unit="B", unit_scale=True, unit_divisor=1024, **_BAR) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance


_BAR: dict[str, Any] = {"delay": 1, "disable": None, "leave": False}
"""With None for `disable`, tqdm shows a bar only on a terminal."""


def _finite(value: Any) -> Any:
    """Return a value without NaN and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
