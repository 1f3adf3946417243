"""Text for messages: print untrusted text safely, count nouns, shorten lists, align tables."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable, Sequence

SLIPS = 4
"""Letters in which a word and the one that is meant may differ: two that are replaced count for
four."""

LONGEST = 10_000
"""Largest number of characters in one message."""

_short_repr = reprlib.Repr()
_short_repr.maxstring = 200
_short_repr.maxother = 200


def printable(text: str, limit: int = LONGEST, *, lines: bool = False) -> str:
    """Return untrusted text without what moves a terminal's cursor, and cut to a length.

    With `lines`, line breaks stay.
    """
    if len(text) > limit:
        head = text[: limit - limit // 2]
        tail = text[len(text) - limit // 2 :]
        text = f"{head}[... {len(text) - limit:,} characters ...]{tail}"
    if text.isprintable():
        return text
    characters = []
    for character in text:
        if not character.isprintable() and not (lines and character == "\n"):
            character = character.encode("unicode_escape").decode()
        characters.append(character)
    return "".join(characters)


def brief(value: object) -> str:
    """Return `repr` of a value in about 200 characters, however long or deep the value is."""
    return _short_repr.repr(value)


def counted(count: int, noun: str) -> str:
    """Return a number and a noun, which is plural unless the number is 1."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a question for the known word that a slip or two make of this one, or nothing.

    Of `--flag=value`, only the flag counts.
    """
    name, _, _ = word.partition("=")
    for match in difflib.get_close_matches(name, known, n=1, cutoff=0.8):
        unequal = 1 - difflib.SequenceMatcher(None, name, match).ratio()
        if unequal * len(name + match) <= SLIPS:
            return f" (did you mean {match}?)"
    return ""


def first_few(items: Sequence[str], limit: int, separator: str = "\n") -> str:
    """Return the first items as one text, and say how many more there are."""
    shown = list(items[:limit])
    if len(items) > limit:
        shown.append(f"and {len(items) - limit} more")
    return separator.join(shown)


def group_by_reason(reasons: Iterable[tuple[str, str]]) -> list[str]:
    """Return one line for each reason: its first name, and how many more names have it."""
    names_by_reason: dict[str, list[str]] = {}
    for name, reason in reasons:
        names_by_reason.setdefault(reason, []).append(name)
    lines = []
    for reason, names in names_by_reason.items():
        more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
        lines.append(f"{names[0]}{more}: {reason}")
    return lines


WIDEST = 200
"""Largest number of characters in a cell. All cells of a column are as wide as its widest one."""


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table with aligned columns: numbers to the right, everything else to the left.

    The first column has names, so it is always to the left.
    """
    printed = [_print_cells(row) for row in rows]
    columns = []
    for position, column in enumerate(zip(header, *printed)):
        has_numbers = position > 0 and all(_is_number(cell) for cell in column[1:])
        width = max(len(cell) for cell in column)
        justify = str.rjust if has_numbers else str.ljust
        columns.append([justify(cell, width) for cell in column])
    lines = ["  ".join(row).rstrip() for row in zip(*columns)]
    return "\n".join(lines)


def _print_cells(row: Sequence[object]) -> list[str]:
    return [printable(str(cell), WIDEST) for cell in row]


def _is_number(cell: str) -> bool:
    """Whether a cell has nothing but digits and their signs; an empty one counts as a number."""
    return re.search(r"[^\d.,-]", cell) is None


def join(prefix: str, name: str) -> str:
    """Return the dotted name `prefix.name`, without a dot if one of them is empty."""
    if prefix and name:
        return f"{prefix}.{name}"
    return prefix + name


def cut_common_end(name: str, other: str) -> tuple[list[str], list[str]]:
    """Return the parts of two dotted names that come before their longest common end.

    Those of "model.vision_tower.conv.weight" and "vision_tower.conv.weight" are ["model"] and [].
    """
    parts = name.split(".")
    others = other.split(".")
    while parts and others and parts[-1] == others[-1]:
        parts.pop()
        others.pop()
    return parts, others
