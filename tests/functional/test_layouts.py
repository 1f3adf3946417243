"""Layouts: weights and their matrices, parts of them, and what does not fit."""

import re

import pytest
import torch

from disha import functional
from disha.errors import ArgumentError, ArgumentTypeError
from disha.functional import Geometry, Layout
from disha.functional.layouts import place_outputs
from tests.functional.cases import LAYOUTS, ROWS, on_every_layout


@on_every_layout
def test_a_layout_takes_apart_what_it_puts_together(kind):
    layout, shape = LAYOUTS[kind]
    weight = torch.randn(shape)
    matrices, geometry = layout.matrices(weight), layout.geometry(shape)
    assert tuple(matrices.shape) == (*geometry.stack, geometry.out_features, geometry.in_features)
    assert torch.equal(layout.weight(matrices), weight)
    assert layout.shape(geometry) == shape
    assert layout.reason_against_shape(shape) is None
    turned = layout.transposed()
    if turned is not None:
        assert torch.equal(turned.matrices(weight.mT), matrices)
        assert turned.transposed().pattern == layout.pattern.replace("index", "in")
    rows = ((0, 2), (3, 5))
    assert torch.equal(layout.matrices(layout.part(weight, rows)), matrices[..., [0, 1, 3, 4], :])
    assert layout.part(weight, ()) is weight
    assert layout.part(weight, ((1, 3),)).data_ptr() == matrices[..., 1:, :].data_ptr()


@pytest.mark.parametrize(
    ("layout", "shape", "says"),
    [
        (Layout("out in"), (6,), "shape .6,. does not have the axes 'out in'"),
        (Layout("out in"), (3, 6, 7), "does not have the axes"),
        (Layout("expert in out"), (6, 7), "does not have the axes"),
        (Layout("out in *kernel"), (6, 7), "does not have the axes"),
        (Layout("in out *kernel", groups=3), (7, 6, 2), "3 groups do not divide its 7"),
    ],
)
def test_why_a_weight_has_not_a_layout(layout, shape, says):
    assert re.search(says, layout.reason_against_shape(shape))


def test_a_layout_is_known_by_its_pattern():
    assert functional.layout_of("  expert  out in ") == Layout("expert out in")
    own = Layout("in out *kernel", groups=2)
    assert functional.layout_of(own) is own
    with pytest.raises(ArgumentError, match="unknown layout 'out of'; allowed are 'out in', "):
        functional.layout_of("out of")
    with pytest.raises(ArgumentTypeError, match="a layout must be a str such as 'out in', got 3"):
        functional.layout_of(3)


def test_layouts_as_text_and_the_layout_of_one_expert():
    assert str(Layout("index out", padding_idx=3)) == "'index out' with padding_idx=3"
    assert str(Layout("in out *kernel", groups=2)) == "'in out *kernel' of 2 groups"
    assert str(Layout("out in")) == "'out in'"
    assert Layout("expert in out").of_one_expert() == Layout("in out")
    assert Layout("expert out in").of_one_expert() == Layout("out in")


CONV = Layout("out in *kernel")


@pytest.mark.parametrize(
    ("layout", "geometry", "r", "r_out", "says"),
    [
        (Layout("out in"), Geometry(8, 6), 8, 3, None),
        (Layout("out in"), Geometry(8, 6), 9, None, "r=9 is larger than in_features=8"),
        (Layout("in out"), Geometry(8, 6), 2, 4, "r_out=4 does not divide out_features=6"),
        (Layout("index out"), Geometry(8, 6), 9, None, "r=9 is larger than num_embeddings=8"),
        (Layout("index out"), Geometry(8, 6), 2, 4, "r_out=4 does not divide embedding_dim=6"),
        (CONV, Geometry(8, 6, (3,)), 9, None, "r=9 is larger than its 8 input channels per group"),
        (CONV, Geometry(8, 6, (3,)), 2, 4, "r_out=4 does not divide its 6 output channels"),
        (Layout("out in"), Geometry(0, 6), 1, None, "its weight is empty"),
        (Layout("out in"), Geometry(8, 0), 1, None, "its weight is empty"),
        (Layout("expert out in"), Geometry(8, 6, (0,)), 1, None, "its weight is empty"),
    ],
)
def test_why_a_block_does_not_fit(layout, geometry, r, r_out, says):
    assert layout.reason_against(geometry, r, r_out) == says


@pytest.mark.parametrize("dim", [0, 1, -1, -2])
@pytest.mark.parametrize("rows", [*ROWS, ((4, 6),), ((0, 6),)], ids=str)
def test_rows_are_taken_and_placed(rows, dim):
    whole = torch.randn(6, 6)
    pattern = "in out" if dim in (1, -1) else "out in"
    taken = Layout(pattern).part(whole, rows)
    chosen = [row for first, stop in rows or ((0, 6),) for row in range(first, stop)]
    assert torch.equal(taken, whole.index_select(dim, torch.tensor(chosen)))
    placed = place_outputs(taken, rows, 6, dim)
    expected = torch.zeros(6, 6).index_copy(dim, torch.tensor(chosen), taken)
    assert torch.equal(placed, expected)


def test_a_part_of_a_table_keeps_its_own_padding_index():
    layout = Layout("index out", padding_idx=2)
    found = {rows: layout.of_part((rows, (0, 8))).padding_idx for rows in ((0, 2), (2, 4), (1, 3))}
    assert found == {(0, 2): None, (2, 4): 0, (1, 3): 1}
