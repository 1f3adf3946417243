"""Plain-text tables for what the library prints."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["printable", "table"]


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table with aligned columns: the first to the left, others to the right if numbers.

    Args:
        header: titles of the columns.
        rows: cells, one per column.

    Example:
        >>> from disha.tables import table
        >>> print(table(("name", "n"), [("a", 1), ("bc", 23)]))
        name   n
        a      1
        bc    23
    """
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    columns = list(zip(header, *cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [i > 0 and all(map(_is_number, column[1:])) for i, column in enumerate(columns)]
    lines = []
    for row in [list(header), *cells]:
        aligned = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def printable(text: str, keep: str = "") -> str:
    r"""Return a text in which no character moves the cursor, hides others, or is no character.

    Names and notes in a file can be anybody's, and a terminal obeys what is printed to it.

    Args:
        text: what is to be printed.
        keep: characters that stay as they are.

    Example:
        >>> from disha.tables import printable
        >>> print(printable("a\x1b[2Jb"))
        a\x1b[2Jb
    """
    if text.isprintable():
        return text
    escaped = (c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)
    return "".join(escaped)


def _is_number(cell: str) -> bool:
    return cell.replace(",", "").replace(".", "").replace("-", "").isdigit() or cell in ("", "-")
