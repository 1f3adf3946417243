"""What commands print: text for people, or one JSON object for scripts."""

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

__all__ = ["advancing", "fit_for", "require_free", "show", "shown"]

T = TypeVar("T")


def require_free(path: Path, overwrite: bool) -> None:
    """Raise if there is something where a result is to be, unless it may be replaced."""
    if path.exists() and not overwrite:
        raise ArgumentError(f"{path} is there already; name another, or pass overwrite=True")


def show(as_json: bool, text: str, fields: Mapping[str, Any]) -> None:
    """Print what was found or done.

    Args:
        as_json: print the fields, not the text.
        text: for people.
        fields: for scripts; numbers that are not finite become null.
    """
    print(json.dumps(_finite(fields), indent=2) if as_json else fit_for(sys.stdout, text))


def fit_for(stream: TextIO, text: str) -> str:
    """Return a text as a stream can take it, and a terminal behind it."""
    encoding = stream.encoding or "utf-8"
    return (
        printable(text, len(text), lines=True).encode(encoding, "backslashreplace").decode(encoding)
    )


def _finite(value: Any) -> Any:
    """Return a value without numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shown(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Iterate with a progress bar: after a second, and if somebody is looking.

    Args:
        items: what to iterate over.
        total: how many they are.
        what: what is being done.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    yield from tqdm(items, what, total, **_BAR)


@contextmanager
def advancing(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield what shows progress in bytes, if it is told of those that are done and of all.

    Args:
        what: what is being done.
    """
    from tqdm import tqdm

    with tqdm(desc=what, unit="B", unit_scale=True, unit_divisor=1024, **_BAR) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance


# On stderr, and none where that is no terminal.
_BAR: dict[str, Any] = {"delay": 1, "disable": None, "leave": False}
