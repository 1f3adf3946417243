"""Every layout and every method: weights and blocks of them, and what loops compute of them."""

from typing import NamedTuple

import pytest
import torch

from disha.functional import PATTERNS, Layout, method_of
from disha.functional.layouts import OutputRanges
from tests import reference
from tests.conftest import close

LAYOUTS = {pattern: (Layout(pattern), reference.shape_of(pattern)) for pattern in PATTERNS} | {
    "padded embedding": (Layout("index out", padding_idx=2), (7, 6)),
    "conv1d": (Layout("out in *kernel"), (6, 7, 3)),
    "conv3d": (Layout("out in *kernel"), (6, 5, 2, 1, 2)),
    "transposed 1d": (Layout("in out *kernel"), (7, 6, 3)),
    "grouped transposed 1d": (Layout("in out *kernel", groups=2), (14, 6, 2)),
    "grouped transposed 2d": (Layout("in out *kernel", groups=2), (10, 6, 2, 2)),
    "transposed 3d": (Layout("in out *kernel"), (7, 6, 2, 1, 2)),
}
"""Every layout, and layouts in more dimensions: weights with 6 outputs, and 7 or 5 inputs."""

BLOCKS = {
    "bone r=1": ("bone", 1, None),
    "bone r=3": ("bone", 3, None),
    "bone r=5": ("bone", 5, None),
    "tile r=3": ("bone", 3, 2),
    "groups r=1": ("bone_groups_all", 1, None),
    "groups r=2": ("bone_groups_all", 2, None),
    "groups r=3": ("bone_groups2", 3, None),
    "lora r=1": ("lora", 1, None),
    "lora r=3": ("lora", 3, None),
    "bat r=2": ("bat", 2, None),
    "bat r=4": ("bat", 4, None),
}
"""Method, r and r_out: r divides neither size, or only the outputs."""

CUTS_AT = {"bone": lambda r: 1, "lora": lambda r: 1, "bat": lambda r: r}
"""Method -> the number of which the edges of a part must be multiples, to cut a block there.

Blocks with groups of shards have a test of their own.
"""

ROWS = [((1, 3),), ((0, 2), (3, 5)), ((0, 1), (1, 4))]

on_every_layout = pytest.mark.parametrize("kind", LAYOUTS)

with_every_block = pytest.mark.parametrize("name", BLOCKS)


def on_every_layout_with_every_block(check):
    """Make a test of a check of a layout and a block: a case for each layout, quicker than one for
    each pair."""

    @on_every_layout
    def test(kind):
        for name in BLOCKS:
            check(kind, name)

    return test


class Case(NamedTuple):
    """A weight and a block of it."""

    method: str
    layout: Layout
    r: int
    weight: torch.Tensor
    block: torch.Tensor
    rows: OutputRanges

    @property
    def geometry(self):
        return self.layout.geometry(self.weight.shape, self.rows)

    @property
    def delta(self):
        """DW as the table has it."""
        return method_of(self.method).delta_weight(self.layout, self.block, self.weight, self.rows)

    @property
    def expected(self):
        """DW as the loops have it."""
        layout = self.layout
        return reference.layout_delta_weight(
            self.method, layout.pattern, self.block, self.weight, self.rows,
            layout.groups, layout.padding_idx,
        )  # fmt: skip


def case_of(kind, name, rows=(), dtype=torch.float64):
    (layout, shape), (method, r, r_out) = LAYOUTS[kind], BLOCKS[name]
    weight = torch.randn(shape, dtype=dtype)
    block = torch.randn(method_of(method).block_shape(layout, shape, r, r_out, rows), dtype=dtype)
    return Case(method, layout, r, weight, block, rows)


def stack_of(kind):
    """The sizes in front of a block, by the names of the weight's axes."""
    layout, shape = LAYOUTS[kind]
    axes = layout.pattern.split()
    experts = (shape[axes.index("expert")],) if "expert" in axes else ()
    groups = (layout.groups,) if layout.pattern == "in out *kernel" else ()
    return (*experts, *groups, *(shape[axes.index("*kernel") :] if "*kernel" in axes else ()))


def check_same(method, found, expected):
    """Compare bit for bit what only copies numbers, or adds zeros; a LoRA adds in other orders."""
    if method == "lora":
        close(found, expected, 1e-12)
    else:
        assert torch.equal(found, expected)
