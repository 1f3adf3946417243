"""Text for messages: foreign text made safe to print, numbers with nouns, and short lists."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

__all__ = ["brief", "counted", "first_few", "printable"]

LONGEST = 10_000
"""Most characters of one message."""

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 200


def printable(text: str, limit: int = LONGEST, *, lines: bool = False) -> str:
    r"""Return a text with unprintable characters escaped, and without its middle if it is long.

    So a name in a file can't move the reader's cursor, hide the text after it, or fill the screen.

    Args:
        text: any text.
        limit: how many characters of the text are kept at most.
        lines: whether line breaks are kept.

    Examples:
        >>> from disha.text import printable
        >>> printable("layers.0\x1b[2J")
        'layers.0\\x1b[2J'
        >>> printable("a" * 5000, limit=8)
        'aaaa[... 4,992 characters ...]aaaa'
    """
    if len(text) > limit:
        head, tail = text[: limit - limit // 2], text[len(text) - limit // 2 :]
        text = f"{head}[... {len(text) - limit:,} characters ...]{tail}"
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() or (lines and one == "\n") else _escaped(one) for one in text
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def brief(value: object) -> str:
    """Return `repr` of a value in about 200 characters, however long or deep the value is.

    Args:
        value: any value.

    Examples:
        >>> from disha.text import brief
        >>> brief(list(range(1000)))
        '[0, 1, 2, 3, 4, 5, ...]'
    """
    return _brief.repr(value)


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless the number is 1.

    Args:
        count: the number.
        noun: the noun in the singular; its plural ends in s.

    Examples:
        >>> from disha.text import counted
        >>> counted(1, "layer"), counted(1234, "parameter")
        ('1 layer', '1,234 parameters')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def first_few(items: Sequence[str], limit: int, separator: str = "\n") -> str:
    """Return the first of several items as one text that says how many others there are.

    Args:
        items: the items.
        limit: how many are shown.
        separator: what stands between them.

    Examples:
        >>> from disha.text import first_few
        >>> first_few(["a", "b", "c", "d"], 2, "; ")
        'a; b; and 2 more'
    """
    more = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return separator.join([*items[:limit], *more])
