"""Plain-text tables for what the library prints."""

from __future__ import annotations

from collections.abc import Sequence

from disha.text import printable

__all__ = ["WIDEST", "table"]


WIDEST = 200
"""Largest number of characters in a cell. All cells of a column are as wide as its widest one."""

LAST = 500
"""The same for the last column, which is not padded."""


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table with aligned columns: numbers to the right, everything else to the left.

    Args:
        header: titles of the columns.
        rows: the cells of each row, one per column.

    Examples:
        >>> from disha.tables import table
        >>> print(table(("name", "n"), [("a", 1), ("bc", 23)]))
        name   n
        a      1
        bc    23
    """
    limits = [WIDEST] * (len(header) - 1) + [LAST]
    cells = [list(map(printable, map(str, row), limits)) for row in rows]
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


def _is_number(cell: str) -> bool:
    return cell.replace(",", "").replace(".", "").replace("-", "").isdigit() or cell in ("", "-")
