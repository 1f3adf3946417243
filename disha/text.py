"""Text for messages: make untrusted text safe to print, count nouns, and shorten lists."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable, Sequence

LONGEST = 10_000  # characters in one message


_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 200


def printable(text: str, limit: int = LONGEST, *, lines: bool = False) -> str:
    """Return a text that can't move a terminal's cursor, hide other text, or fill the screen."""
    if len(text) > limit:
        head = text[: limit - limit // 2]
        tail = text[len(text) - limit // 2 :]
        text = f"{head}[... {len(text) - limit:,} characters ...]{tail}"
    if text.isprintable():
        return text
    return "".join(
        character
        if character.isprintable() or (lines and character == "\n")
        else character.encode("unicode_escape").decode()
        for character in text
    )


def brief(value: object) -> str:
    """Return `repr` of a value in about 200 characters, however long or deep the value is."""
    return _brief.repr(value)


def counted(count: int, noun: str) -> str:
    """Return a number and a noun, which is plural unless the number is 1."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a question for the end of a message: whether the known word most like it is meant.

    Of `--flag=value`, only the flag counts.
    """
    near = difflib.get_close_matches(word.partition("=")[0], known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def first_few(items: Sequence[str], limit: int, separator: str = "\n") -> str:
    """Return the first items as one text, with the number of the remaining ones."""
    more = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return separator.join([*items[:limit], *more])


def grouped(reasons: Iterable[tuple[str, str]]) -> list[str]:
    """Return one text for all names that have the same reason."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons:
        names.setdefault(reason, []).append(name)
    return [
        f"{same[0]}{f' and {len(same) - 1:,} more' if same[1:] else ''}: {reason}"
        for reason, same in names.items()
    ]


WIDEST = 200
"""Largest number of characters in a cell. All cells of a column are as wide as its widest one."""


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table with aligned columns: numbers to the right, everything else to the left."""
    cells = [[printable(str(cell), WIDEST) for cell in row] for row in rows]
    columns = []
    for number, column in enumerate(zip(header, *cells)):
        width = max(map(len, column))
        right = number > 0 and not any(re.search(r"[^\d.,-]", cell) for cell in column[1:])
        columns.append([cell.rjust(width) if right else cell.ljust(width) for cell in column])
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns))


def join(prefix: str, name: str) -> str:
    """Return `prefix.name`, or the one that is not empty."""
    return f"{prefix}.{name}" if prefix and name else prefix or name
