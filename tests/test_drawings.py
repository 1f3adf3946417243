"""The drawings are those that their code makes now, and show what the oracles compute."""

from __future__ import annotations

import re
from dataclasses import dataclass
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from docs.drawings.__main__ import ASSETS
from docs.drawings.canvas import WIDTH
from docs.drawings.figures import FIGURES
from docs.drawings.landing import reach
from tests import reference

PHONE = 358
"""Width in pixels that a phone's page leaves a drawing."""


@dataclass(frozen=True)
class Square:
    x: int
    y: int
    width: int
    fill: str | None
    kind: str | None


def squares_of(name):
    """Return the rectangles of a drawing, in the order in which they were drawn."""
    root = ElementTree.fromstring((ASSETS / name).read_text(encoding="utf-8"))
    rects = root.iter("{http://www.w3.org/2000/svg}rect")
    return [
        Square(int(r.get("x")), int(r.get("y")), int(r.get("width")), r.get("fill"), r.get("class"))
        for r in rects
    ]


def cells_of(name):
    """Return the cells of blocks and weights, colour or kind, in the order of drawing."""
    found = [square for square in squares_of(name) if square.kind not in ("panel", "mark")]
    return [square.fill or square.kind for square in found]


def numbers(*shape):
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)


def assert_lands(name, block_numbers, delta_numbers):
    """The cells of a block, then those of dW: each number has one colour, wherever it arrives.

    In dW, 0 stands for a cell that is cropped away.
    """
    cells = cells_of(name)
    count = block_numbers.numel()
    colours = dict(zip(block_numbers.flatten().tolist(), cells[:count], strict=True))
    assert len(set(colours.values())) == count
    drawn = cells[count : count + delta_numbers.numel()]
    colours[0.0] = "cropped"
    assert drawn == [colours[number] for number in delta_numbers.flatten().tolist()]


def padded(delta, columns):
    return torch.nn.functional.pad(delta, (0, columns - delta.shape[1]))


def kernels(tensor):
    """Lay the kernels (out, in, *kernel) one after the other, as they are drawn."""
    return tensor.flatten(2).flatten(0, 1)


@pytest.mark.parametrize("name", FIGURES)
def test_the_file_is_what_the_code_draws(name):
    assert (ASSETS / name).read_bytes() == FIGURES[name]().encode(), "run `python -m docs.drawings`"


def test_bone():
    block = numbers(4, 8)
    delta = reference.bone_delta_weight(block, 14, 8)
    assert_lands("shards-bone.svg", block.T, padded(delta, 16))


def test_tile():
    block = numbers(4, 4)
    delta = reference.bone_delta_weight(block, 14, 8)
    assert_lands("shards-tile.svg", block.T, padded(delta, 16))


def test_bat():
    block = numbers(2, 4, 4)
    delta = reference.bat_delta_weight(torch.zeros(8, 12), block)
    assert_lands("shards-bat.svg", block, delta)


def test_conv():
    block = numbers(4, 2, 3, 3)
    delta = reference.conv_delta_weight(block, 5, 4)
    cropped = torch.zeros(4, 1, 3, 3)
    assert_lands("shards-conv.svg", kernels(block), kernels(torch.cat([delta, cropped], 1)))


def test_embedding():
    block = numbers(4, 6)
    delta = reference.embedding_delta_weight(block, 10, 6)
    assert_lands("shards-embedding.svg", block, torch.cat([delta, torch.zeros(2, 6)]))


def test_overview():
    cells = cells_of("shards.svg")
    block = numbers(4, 8)
    delta = reference.bone_delta_weight(block, 12, 8)
    weight, update, small = cells[:96], cells[96:192], cells[192:224]
    colours = dict(zip(block.T.flatten().tolist(), small, strict=True))
    assert set(weight) == {"frozen"}
    assert update == [colours[number] for number in delta.flatten().tolist()]


def test_what_a_cell_of_bat_is_computed_from():
    cell, weight, block = (6, 9), numbers(8, 12), numbers(2, 4, 4)
    needed = reach(nn.Linear(12, 8, bias=False), 4, cell)

    def changes(tensor):
        found = []
        for index in torch.ones(tensor.shape).nonzero().tolist():
            before = reference.bat_delta_weight(weight, block)[cell].item()
            tensor[tuple(index)] += 1
            if reference.bat_delta_weight(weight, block)[cell].item() != before:
                found.append(tuple(index))
            tensor[tuple(index)] -= 1
        return found

    assert needed.weight == changes(weight) == [(6, 8), (6, 9), (6, 10), (6, 11)]
    assert needed.block == changes(block) == [(1, k, 1) for k in range(4)]


@pytest.mark.parametrize(
    ("name", "number", "everywhere"),
    [("shards-bone.svg", (1, 5), 1 + 4), ("shards-tile.svg", (1, 2), 1 + 8)],
)
def test_one_number_is_framed_wherever_it_arrives(name, number, everywhere):
    squares = squares_of(name)
    frames = [square for square in squares if square.kind == "mark"]
    assert len(frames) == everywhere
    framed = {
        square.fill
        for square in squares
        for frame in frames
        if square.fill and (square.x, square.y) == (frame.x + 1, frame.y + 1)
    }
    rows = {"shards-bone.svg": 8, "shards-tile.svg": 4}[name]
    place, output = number
    assert framed == {cells_of(name)[output * 4 + place]}
    assert len(set(cells_of(name)[: 4 * rows])) == 4 * rows


@pytest.mark.parametrize("name", FIGURES)
def test_text_is_legible_on_a_phone(name):
    text = (ASSETS / name).read_text(encoding="utf-8")
    sizes = [int(size) for size in re.findall(r"(\d+)px", text)]
    assert sizes
    assert min(sizes) * PHONE / WIDTH >= 11
