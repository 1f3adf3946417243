"""One block on one weight: what it adds to the weight, and its factors; and sums of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from disha.functional.bone import BONE
from disha.functional.layouts import Geometry, Layout, OutputRanges, place_outputs
from disha.functional.method import Down, Method
from disha.functional.shard_sums import Scale, merged_weight, scaled


class Update(NamedTuple):
    """One block on one weight.

    Attributes:
        method: the block's method.
        block: D, as layers keep it (`Method.kept_block`).
        scale: runtime scale s.
        dropout: current probability of zeroing each of the block's inputs; 0 in evaluation.
        output_ranges: the outputs that the block adapts, as ranges (first, stop); empty for all.
        chosen: indices of the matrices of a stack, for experts chosen by token; None for all.

    Examples:
        >>> import torch
        >>> from disha.functional import Update, method_of
        >>> Update(method_of("bone"), torch.zeros(2, 3), scale=0.5).output_ranges
        ()
    """

    method: Method
    block: Tensor
    scale: Scale = 1.0
    dropout: float = 0.0
    output_ranges: OutputRanges = ()
    chosen: Tensor | None = None

    # Methods, because torch 2.8 compiles neither `_replace` nor a property of a tuple.

    def replace(self, **fields: Any) -> Update:
        """Return the update with other values of some fields."""
        return Update(**(dict(zip(Update._fields, self)) | fields))

    def chosen_block(self) -> Tensor:
        """Return the block of the chosen matrices."""
        return self.block if self.chosen is None else self.block[self.chosen]

    def delta_weight(self, layout: Layout, weight: Tensor) -> Tensor:
        """Return dW, without the scale."""
        return self.method.delta_weight(layout, self.chosen_block(), weight, self.output_ranges)

    def geometry(self, layout: Layout, whole: Geometry) -> Geometry:
        """Return the geometry of the block, from that of the weight."""
        outputs = whole.out_features
        stack = whole.stack
        if self.output_ranges:
            outputs = sum([stop - first for first, stop in self.output_ranges])
        if self.chosen is not None:
            # The weight has only the chosen matrices, and the block has all of them.
            stack = self.method.stack_of(layout, self.block.shape)
        return Geometry(whole.in_features, outputs, stack, whole.kernel_axes)

    def select_matrices(self, index: int | slice | Tensor) -> Update:
        """Return the update of one matrix of a stack, or of several."""
        if isinstance(index, Tensor) and index.dim() == 1:
            # Blocks are gathered only where they are used, because there may be one for each token.
            chosen = index if self.chosen is None else self.chosen[index]
            return self.replace(chosen=chosen)
        return self.replace(block=self.chosen_block()[index], chosen=None)

    def unstack(self) -> list[Update]:
        """Return the updates of all matrices of a stack; one `unbind` gives D one gradient."""
        return [self.replace(block=block, chosen=None) for block in self.chosen_block().unbind(0)]


def computed_weight(weight: Tensor, layout: Layout, updates: Sequence[Update]) -> Tensor:
    """Return W + sum of s dW, computed in float32 (float64 for float64) and rounded once.

    Args:
        weight: W.
        layout: its layout.
        updates: the blocks; their dropout is ignored.

    Returns:
        Tensor of W's shape and dtype.

    Examples:
        >>> import torch
        >>> from disha.functional import Layout, Update, computed_weight, method_of
        >>> update = Update(method_of("bone"), torch.ones(2, 1))
        >>> computed_weight(torch.zeros(1, 3), Layout("out in"), [update])
        tensor([[1., 1., 1.]])
    """
    if not updates:
        return weight
    deltas = [(update.delta_weight(layout, weight), update.scale) for update in updates]
    return merged_weight(weight, deltas)


class Factors(NamedTuple):
    """A and s R of an update of low rank, dW = R^T A."""

    update: Update
    down: Down
    up: Tensor  # in the form of the method
    geometry: Geometry  # of the outputs that the update adapts
    outputs: int  # of the whole weight

    def dense_up(self) -> Tensor:
        """Return s R (..., k, out), with zeros for the outputs that the update does not adapt."""
        matrix = self.update.method.dense_up(self.up, self.geometry)
        return place_outputs(matrix, self.update.output_ranges, self.outputs, dim=-1)


def factors_of(update: Update, layout: Layout, geometry: Geometry) -> Factors:
    """Return the factors of an update on a weight of this geometry."""
    method = update.method
    part = update.geometry(layout, geometry)
    down, up = method.factors(method.matrix_block(layout, update.block), part)
    return Factors(update, down, scaled(up, update.scale), part, geometry.out_features)


def add_up(updates: Sequence[Update], layout: Layout, geometry: Geometry) -> list[Update]:
    """Return fewer updates with the same sum of s dW, where some can be added up."""
    sums: list[Update] = []
    for update in updates:
        for position, former in enumerate(sums):
            total = _add(former, update, layout, geometry)
            if total is not None:
                sums[position] = total
                break
        else:
            sums.append(update)
    return sums


def _add(first: Update, second: Update, layout: Layout, geometry: Geometry) -> Update | None:
    """Return the sum of two updates as one, or None if they have no such sum."""
    if first.dropout or second.dropout or first.chosen is not None or second.chosen is not None:
        return None  # each has an input, or a choice of matrices, of its own
    method = first.method
    differ_in_values = (
        method is second.method
        and first.output_ranges == second.output_ranges
        and first.block.shape == second.block.shape
        and first.block.dtype == second.block.dtype
    )
    if differ_in_values and method.additive:
        block = scaled(first.block, first.scale) + scaled(second.block, second.scale)
        return first.replace(block=block, scale=1.0)
    # Shard sums of one size are those of a Bone, whose block is the sum of R.
    if not (_may_have_sums(method) and _may_have_sums(second.method)):
        return None
    if first.block.shape[-2] != second.block.shape[-2]:
        return None  # another rank, which is seen without computing the factors
    a = factors_of(first, layout, geometry)
    b = factors_of(second, layout, geometry)
    are_sums = isinstance(a.down, int) and isinstance(b.down, int)
    if are_sums and a.down == b.down and a.up.dtype == b.up.dtype:
        block = BONE.kept_block(layout, a.dense_up() + b.dense_up())
        return Update(BONE, block)
    return None


def _may_have_sums(method: Method) -> bool:
    return method.low_rank and not method.compact
