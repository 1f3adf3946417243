"""One drawing for each method, and the overview."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from docs.drawings.canvas import WIDTH, Canvas
from docs.drawings.colours import colour
from docs.drawings.effective import effective_weight
from docs.drawings.grids import Cell, Grid
from docs.drawings.landing import Index, Landing, landing, reach

R, OUT, IN, CROPPED_IN = 4, 8, 12, 14
LEFT, TOP = 38, 98
"""The position of the first grid in a drawing."""

Shade = Callable[[Index], str]
"""The colour of a number of a block."""


def bone() -> str:
    """Draw MiSS, with a last shard that is cropped."""
    found = landing(_linear(CROPPED_IN), R)
    canvas = _begun(330, "MiSS", "dW[o, i] = D[i mod r, o]")
    _draw_shards(canvas, found, "dW, in = 14")
    _note(canvas, 304, "The frame: one number of D, once in every shard.")
    return canvas.svg()


def groups() -> str:
    """Draw MiSS with two groups of shards."""
    found = landing(_linear(16), R, "bone_groups2")
    canvas = _begun(360, "Groups of shards", "if (i // r) mod g = o mod g")
    _draw_shards(canvas, found, "dW, in = 16, g = 2; empty cells are 0")
    _note(canvas, 304, "The frame: one number of D, once in every second shard.")
    _note(canvas, 326, "Even outputs see shards 0 and 2, odd ones 1 and 3.")
    return canvas.svg()


def _draw_shards(canvas: Canvas, found: Landing, caption: str) -> None:
    """Draw a block that all shards share, and the update that it makes."""
    block = Grid(LEFT, TOP, OUT, R)
    delta = Grid(150, TOP, OUT, 16, run=(None, R))
    _pair(canvas, found, block, delta, by_place(OUT), marked=(1, 5))
    _between(canvas, block, delta)
    _sizes(canvas, block, "r = 4", "out = 8")
    _shards(canvas, delta)
    _caption(canvas, block, "D")
    _caption(canvas, delta, caption)


def tile() -> str:
    """Draw a tile."""
    found = landing(_linear(CROPPED_IN), R, r_out=4)
    canvas = _begun(338, "Tile", "dW[o, i] = D[i mod r, o mod r_out]")
    block = Grid(LEFT, TOP, 4, R)
    delta = Grid(150, TOP, OUT, 16, run=(4, R))
    _pair(canvas, found, block, delta, by_place(4), marked=(1, 2))
    _between(canvas, block, delta)
    _sizes(canvas, block, "r = 4", "r_out = 4")
    _shards(canvas, delta)
    _caption(canvas, block, "D")
    _caption(canvas, delta, "dW, out = 8, in = 14")
    _note(canvas, 312, "The frame: one number of D, in every shard and tile.")
    return canvas.svg()


def bat() -> str:
    """Draw BAT: what is added, and what one cell depends on."""
    cell = (6, 9)
    found = landing(_linear(), R, "bat")
    needed = reach(_linear(), R, cell)
    canvas = _begun(572, "BAT", "dW_ab = W_ab D_a + D_a")
    block = Grid(LEFT, TOP, OUT, R, run=(R, None))
    delta = Grid(174, TOP, OUT, IN, run=(R, R))
    weight = Grid(174, 306, OUT, IN, run=(R, R))
    shade = by_block(R)
    block.draw(canvas, lambda at: shade((at[0] // R, at[0] % R, at[1])))
    _coloured(canvas, delta, found, shade)
    weight.draw_frozen(canvas)
    delta.mark(canvas, cell, cell)
    _mark_all(canvas, block, [(a * R + k, j) for a, k, j in needed.block])
    _mark_all(canvas, weight, [(o, i) for o, i in needed.weight])
    _between(canvas, block, delta)
    _sizes(canvas, block, "r = 4", "")
    for a in range(2):
        y = block.corner((a * R, 0))[1] + 2 * block.size
        canvas.text(28, y, f"D_{a}", "soft", anchor="middle", turn=-90)
    _shards(canvas, delta)
    _caption(canvas, block, "D")
    _caption(canvas, delta, "dW, to which every D_a is added")
    _caption(canvas, weight, "W, by which every D_a is multiplied")
    _note(canvas, 528, "The frames: one number of dW is made of")
    _note(canvas, 550, "a column of D_a and a row of a tile of W.")
    return canvas.svg()


def conv() -> str:
    """Draw a convolution: cells are kernels."""
    found = landing(nn.Conv2d(5, 4, 3, bias=False), r=2)
    canvas = _begun(364, "Convolution", "dW[o, i, *k] = D[o, i mod r, *k]")
    block = Grid(LEFT, TOP, 4, 2, size=40)
    delta = Grid(184, TOP, 4, 6, size=40, run=(None, 2))

    def shade(number: Index) -> str:
        o, j, row, column = number
        return colour(o + 4 * j, 3 * row + column, 9)

    _kernels(canvas, block, lambda o, j, row, column: shade((o, j, row, column)))
    _kernels(
        canvas,
        delta,
        lambda o, i, row, column: (
            shade(found.origin[o, i, row, column]) if (o, i, row, column) in found.origin else None
        ),
    )
    for grid, cells in ((block, [(1, 1)]), (delta, _kernels_of(found, (1, 1)))):
        for at in cells:
            grid.mark(canvas, at, at)
    _between(canvas, block, delta)
    _sizes(canvas, block, "r = 2", "out = 4")
    _shards(canvas, delta)
    _caption(canvas, block, "D")
    _caption(canvas, delta, "dW, in = 5 channels")
    _note(canvas, 338, "The frame: one kernel of D, once in every shard.")
    return canvas.svg()


def embedding() -> str:
    """Draw an embedding: shards run over the rows of the table."""
    table, dim, index = 10, 6, 6
    found = landing(nn.Embedding(table, dim), R)
    canvas = _begun(386, "Embedding", "dW[i] = D[i mod r]")
    block = Grid(LEFT, TOP, R, dim)
    delta = Grid(206, TOP, 12, dim, run=(R, None))
    shade = by_row(dim)
    block.draw(canvas, shade)
    _coloured(canvas, delta, found, shade)
    row = found.origin[index, 0][0]
    block.mark(canvas, (row, 0), (row, dim - 1))
    delta.mark(canvas, (index, 0), (index, dim - 1))
    _between(canvas, block, delta)
    _sizes(canvas, block, "dim = 6", "r = 4")
    canvas.text(delta.middle[0], TOP - 12, "dim = 6", "soft", anchor="middle")
    for shard in range(3):
        y = delta.corner((R * shard, 0))[1] + 2 * delta.size + 5
        where = delta.right + 14
        if shard != index // R:
            canvas.text(where, y, f"shard {shard}", "soft")
    y = delta.corner((index, 0))[1] + 14
    canvas.text(delta.right + 14, y - 10, f"index {index}:", "")
    canvas.text(delta.right + 14, y + 11, f"{index} mod {R} = {row}", "")
    _caption(canvas, block, "D")
    _caption(canvas, delta, "dW, 10 rows")
    return canvas.svg()


def overview() -> str:
    """Draw what sharding is, and the three methods."""
    canvas = Canvas(586, "One small block D is added to every shard of a frozen weight W")
    found = landing(_linear(), R)
    shade = by_place(OUT)
    weight = Grid(26, 66, OUT, IN, size=15, run=(None, R))
    delta = Grid(258, 66, OUT, IN, size=15, run=(None, R))
    block = Grid(delta.corner((0, R))[0], 240, OUT, R, size=15)
    weight.draw_frozen(canvas)
    _coloured(canvas, delta, found, shade)
    block.draw(canvas, lambda at: shade((at[1], at[0])))
    for grid, head, line in (
        (weight, "W, frozen", "cut into shards of r inputs"),
        (delta, "dW, its update", "the same D in every shard"),
    ):
        canvas.text(grid.middle[0], 32, head, "head", anchor="middle")
        canvas.text(grid.middle[0], 54, line, "soft", anchor="middle")
    canvas.text((weight.right + delta.x) // 2, weight.middle[1] + 6, "+", "head", anchor="middle")
    _into_shards(canvas, block, delta)
    canvas.text(block.x - 20, 290, "D, one small block", "head", anchor="end")
    canvas.text(block.x - 20, 312, "r by out numbers:", "soft", anchor="end")
    canvas.text(block.x - 20, 333, "all that is trained", "soft", anchor="end")
    _kinds(canvas, 428)
    return canvas.svg()


def _into_shards(canvas: Canvas, block: Grid, delta: Grid) -> None:
    """Draw arrows from a block below dW into each of its shards."""
    middle, fork = block.middle[0] - 1, (delta.bottom + block.y) // 2 + 6
    canvas.line((middle, block.y - 8), (middle, fork))
    for shard in range(IN // R):
        x = delta.corner((0, shard * R))[0] + R * delta.size // 2 - 1
        canvas.arrow((middle, fork), (x, fork), (x, delta.bottom + 6))


def _kinds(canvas: Canvas, y: int) -> None:
    """Draw dW of the three methods, small."""
    place, block = by_place(OUT), by_block(R)
    tile_place = by_place(R)
    canvas.rect(26, y - 52, WIDTH - 52, 1, kind="frozen")
    for x, found, shade, run, words in (
        (
            26,
            landing(_linear(), R),
            place,
            (None, R),
            ("MiSS", "repeated along", "the inputs"),
        ),
        (
            176,
            landing(_linear(), R, r_out=R),
            tile_place,
            (R, R),
            ("Tile", "repeated along", "both sides"),
        ),
        (
            326,
            landing(_linear(), R, "bat"),
            block,
            (R, R),
            ("BAT", "one per r outputs,", "and times W"),
        ),
    ):
        grid = Grid(x, y, OUT, IN, size=10, run=run, gap=4)
        _coloured(canvas, grid, found, shade)
        middle = grid.middle[0] - 1
        canvas.text(middle, y - 16, words[0], "head", anchor="middle")
        canvas.text(middle, y + 112, words[1], "soft", anchor="middle")
        canvas.text(middle, y + 133, words[2], "soft", anchor="middle")


# --- parts of a drawing --------------------------------------------------------------------------


def _linear(in_features: int = IN) -> nn.Linear:
    return nn.Linear(in_features, OUT, bias=False)


def by_place(outputs: int) -> Shade:
    """Return colours for D (r, out): a hue for each position in the shard."""
    return lambda number: colour(number[0], number[1], outputs)


def by_row(columns: int) -> Shade:
    """Return colours for a block whose shards run over its rows."""
    return lambda number: colour(number[0], number[1], columns)


def by_block(r: int) -> Shade:
    """Return colours for D (blocks, r, r): four hues per block, one per position in the shard."""
    return lambda number: colour(4 * number[0] + number[2], number[1], r)


def _begun(height: int, name: str, formula: str) -> Canvas:
    canvas = Canvas(height, f"{name}: {formula}")
    canvas.text(20, 34, name, "head")
    canvas.text(WIDTH - 20, 34, formula, "code", anchor="end")
    return canvas


def _pair(
    canvas: Canvas, found: Landing, block: Grid, delta: Grid, shade: Shade, marked: Cell
) -> None:
    """Draw a block (r, out), outputs downwards as in W, and dW; frame one number in both."""
    block.draw(canvas, lambda at: shade((at[1], at[0])))
    _coloured(canvas, delta, found, shade)
    place, output = marked
    block.mark(canvas, (output, place), (output, place))
    for row, column in found.cells_of(marked):
        delta.mark(canvas, (row, column), (row, column))


def _coloured(canvas: Canvas, delta: Grid, found: Landing, shade: Shade) -> None:
    """Draw the cells of dW in the colours of the numbers that are added there."""
    delta.draw(canvas, lambda at: shade(found.origin[at]) if at in found.origin else None)


def _kernels(canvas: Canvas, grid: Grid, shade: Callable[[int, int, int, int], str | None]) -> None:
    for o, i in grid.cells():
        x, y = grid.corner((o, i))
        kernel = Grid(x + 2, y + 2, 3, 3, size=12)

        def fill(at: Cell, o: int = o, i: int = i) -> str | None:
            return shade(o, i, *at)

        kernel.draw(canvas, fill)


def _kernels_of(found: Landing, kernel: Cell) -> list[Cell]:
    cells = [cell for cell, origin in found.origin.items() if origin[:2] == kernel]
    return sorted({(cell[0], cell[1]) for cell in cells})


def _mark_all(canvas: Canvas, grid: Grid, cells: Iterable[Cell]) -> None:
    """Frame cells that form a rectangle."""
    cells = sorted(cells)
    grid.mark(canvas, cells[0], cells[-1])


def _between(canvas: Canvas, block: Grid, delta: Grid) -> None:
    canvas.arrow((block.right + 8, block.middle[1]), (delta.x - 8, block.middle[1]))


def _sizes(canvas: Canvas, block: Grid, across: str, down: str) -> None:
    canvas.text(block.middle[0], block.y - 12, across, "soft", anchor="middle")
    canvas.text(28, block.middle[1], down, "soft", anchor="middle", turn=-90)


def _shards(canvas: Canvas, delta: Grid) -> None:
    run = delta.run[1] or delta.columns
    for shard in range(delta.columns // run):
        left = delta.corner((0, shard * run))[0]
        middle = left + run * delta.size // 2
        canvas.text(middle, delta.y - 12, f"shard {shard}", "soft", anchor="middle")


def _caption(canvas: Canvas, grid: Grid, words: str) -> None:
    canvas.text(grid.middle[0], grid.bottom + 22, words, "soft", anchor="middle")


def _note(canvas: Canvas, y: int, words: str) -> None:
    canvas.text(WIDTH // 2, y, words, anchor="middle")


FIGURES = {
    "effective.svg": effective_weight,
    "shards.svg": overview,
    "shards-bone.svg": bone,
    "shards-groups.svg": groups,
    "shards-tile.svg": tile,
    "shards-bat.svg": bat,
    "shards-conv.svg": conv,
    "shards-embedding.svg": embedding,
}
"""File name -> the function that draws it."""
