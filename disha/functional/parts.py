"""The updates of a part of a weight: of some outputs, or of the part that one rank holds.

A part has updates of its own if every block can be cut at its edges, which the method says
(`Method.of_outputs`, `Method.of_inputs`). Where a block can't be cut, but the method is of low
rank, its factors are cut in its place: as the block of a Bone or a LoRA with the same dW, which can
be cut anywhere. Otherwise the whole weight must be computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from disha.functional.bone import BONE
from disha.functional.layouts import Geometry, Layout, OutputRanges
from disha.functional.lora import LORA
from disha.functional.update import Update

_NO_OUTPUTS: OutputRanges = ((0, 0),)
"""The ranges of an update that adapts none of the outputs: `()` would mean all of them."""


def updates_of_outputs(
    updates: Sequence[Update], start: int, stop: int, geometry: Geometry, keep_empty: bool = False
) -> list[Update] | None:
    """Return the updates of the outputs start to stop, or None if a block can't be cut there.

    Updates of other outputs are left out. With `keep_empty`, they stay, with an empty block.
    """
    inside = []
    for update in updates:
        ranges = update.output_ranges
        if not ranges:
            ranges = ((0, geometry.out_features),)
        # From where to where in the block, which has only the outputs of the ranges.
        block_start = count_before(ranges, start)
        block_stop = count_before(ranges, stop)
        if block_start == block_stop:
            if not keep_empty:
                continue
            block_start = block_stop = 0  # at 0, an empty block can be cut whatever r is
        count = count_before(ranges, geometry.out_features)
        # Written out, because torch 2.8 does not compile `_replace`.
        block_geometry = Geometry(geometry.in_features, count, geometry.stack, geometry.kernel_axes)
        part = _cut(update, "of_outputs", block_start, block_stop, block_geometry)
        if part is None:
            return None
        adapts_all = block_stop - block_start == stop - start
        ranges_of_part = () if adapts_all else ranges_inside(ranges, start, stop)
        inside.append(part.replace(output_ranges=ranges_of_part))
    return inside


def _cut(
    update: Update,
    method_name: Literal["of_outputs", "of_inputs"],
    start: int,
    stop: int,
    geometry: Geometry,
) -> Update | None:
    """Return an update with the block that this method of its `Method` cuts, or None."""
    block = getattr(update.method, method_name)(update.block, start, stop, geometry)
    if block is None and update.method.low_rank:
        update = _with_factors(update, geometry)
        block = getattr(update.method, method_name)(update.block, start, stop, geometry)
    return None if block is None else update.replace(block=block)


def _with_factors(update: Update, geometry: Geometry) -> Update:
    """Return an update of low rank as one of Bone or LoRA, with the same dW."""
    down, up = update.method.dense_factors(update.block, geometry)
    if isinstance(down, int):
        return update.replace(method=BONE, block=up)
    return update.replace(method=LORA, block=torch.cat([down, up], -1))


def count_before(ranges: OutputRanges, edge: int) -> int:
    """Return how many outputs of these ranges come before an edge."""
    return sum([min(stop, edge) - first for first, stop in ranges if first < edge])


def ranges_inside(ranges: OutputRanges, start: int, stop: int) -> OutputRanges:
    """Return the ranges within start to stop, counted from start."""
    inside = [
        (max(first, start) - start, min(end, stop) - start)
        for first, end in ranges
        if first < stop and start < end
    ]
    return tuple(inside) if inside else _NO_OUTPUTS


def update_of_part(
    update: Update, layout: Layout, shape: Sequence[int], part: Sequence[tuple[int, int]]
) -> list[Update] | None:
    """Return the updates of a part of a weight, or None if a block can't be cut there.

    A part is a range (start, stop) for each dimension of the weight.
    """
    whole = [(0, size) for size in shape]
    if layout.has_kernel:
        return [update] if list(part) == whole else None
    cut_axes = {}
    for axis, range_of_part, range_of_whole in zip(layout.axes, part, whole, strict=True):
        if range_of_part != range_of_whole:
            cut_axes[axis] = range_of_part
    sizes = list(shape)  # of what is left of the weight
    if "expert" in cut_axes:
        start, stop = cut_axes["expert"]
        update = update.select_matrices(slice(start, stop))
        sizes[layout.axes.index("expert")] = stop - start
    for axis in ("in", "index"):
        if axis in cut_axes:
            start, stop = cut_axes[axis]
            block_geometry = layout.geometry(sizes, update.output_ranges)
            cut = _cut(update, "of_inputs", start, stop, block_geometry)
            if cut is None:
                return None
            update = cut
            sizes[layout.axes.index(axis)] = stop - start
    if "out" not in cut_axes:
        return [update]
    # A rank that has none of the outputs takes part in the sum of their gradients too.
    start, stop = cut_axes["out"]
    return updates_of_outputs([update], start, stop, layout.geometry(sizes), keep_empty=True)
