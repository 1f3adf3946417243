"""Blocks and weights as grids of cells, with a gap before each shard."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from docs.drawings.canvas import Canvas

Cell = tuple[int, int]
"""Row and column."""


@dataclass(frozen=True)
class Grid:
    """Where the cells of a matrix are on a canvas.

    Attributes:
        x: left edge.
        y: upper edge.
        rows: number of rows.
        columns: number of columns.
        size: of a cell, the space that parts it from the next included.
        run: rows and columns of a shard, after which there is a gap; None: no gap.
        gap: its width.
    """

    x: int
    y: int
    rows: int
    columns: int
    size: int = 18
    run: tuple[int | None, int | None] = (None, None)
    gap: int = 8

    @property
    def width(self) -> int:
        """From the left edge of the first column to the right edge of the last."""
        return self.corner((0, self.columns - 1))[0] + self.size - self.x

    @property
    def height(self) -> int:
        """From the upper edge of the first row to the lower edge of the last."""
        return self.corner((self.rows - 1, 0))[1] + self.size - self.y

    @property
    def right(self) -> int:
        """The right edge."""
        return self.x + self.width

    @property
    def bottom(self) -> int:
        """The lower edge."""
        return self.y + self.height

    @property
    def middle(self) -> tuple[int, int]:
        """The middle, from left to right and from top to bottom."""
        return self.x + self.width // 2, self.y + self.height // 2

    def corner(self, cell: Cell) -> tuple[int, int]:
        """Return the upper left corner of a cell."""
        row, column = cell
        return self.x + self._offset(column, self.run[1]), self.y + self._offset(row, self.run[0])

    def _offset(self, index: int, run: int | None) -> int:
        return index * self.size + (index // run * self.gap if run else 0)

    def cells(self) -> Iterable[Cell]:
        """Return all cells, row by row."""
        return ((row, column) for row in range(self.rows) for column in range(self.columns))

    def draw(self, canvas: Canvas, fill: Callable[[Cell], str | None]) -> None:
        """Draw each cell in its colour, or as cropped if it has none."""
        for cell in self.cells():
            shade = fill(cell)
            if shade is None:
                self._square(canvas, cell, kind="cropped")
            else:
                self._square(canvas, cell, fill=shade)

    def draw_frozen(self, canvas: Canvas) -> None:
        """Draw each cell in the colour of a frozen weight."""
        for cell in self.cells():
            self._square(canvas, cell, kind="frozen")

    def mark(self, canvas: Canvas, first: Cell, last: Cell) -> None:
        """Draw a frame around the cells from one to another, inclusive."""
        (x, y), (right, bottom) = self.corner(first), self.corner(last)
        width, height = right + self.size - x, bottom + self.size - y
        canvas.rect(x - 1, y - 1, width, height, kind="mark")

    def _square(self, canvas: Canvas, cell: Cell, *, kind: str = "", fill: str = "") -> None:
        x, y = self.corner(cell)
        canvas.rect(x, y, self.size - 2, self.size - 2, kind=kind, fill=fill)
