"""One block on one weight, and what several of them add: to the weight, or through shard sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from disha.functional.layouts import Geometry, Layout, OutputRanges, place_outputs
from disha.functional.methods import Method
from disha.functional.shard_sums import Scale, merged_weight, scaled, tiled


class Update(NamedTuple):
    """One block on one weight.

    Attributes:
        method: the block's method.
        block: D, as layers keep it (`Method.kept_block`).
        scale: runtime scale s.
        dropout: current probability of zeroing each of the block's inputs; 0 in evaluation.
        output_ranges: the outputs that the block adapts, as ranges (first, stop); empty for all.
        chosen: indices of the matrices of a stack, for experts chosen by token; None for all.
        r: the shard size, which methods of users may need. 0 if it is not given: methods of the
            library know it from their block.

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
    r: int = 0

    # Methods, because torch 2.8 compiles neither `_replace` nor a property of a tuple.

    def replace(self, **fields: Any) -> Update:
        """Return the update with other values of some fields."""
        return Update(**(dict(zip(Update._fields, self)) | fields))

    def chosen_block(self) -> Tensor:
        """Return the block of the chosen matrices."""
        return self.block if self.chosen is None else self.block[self.chosen]

    def delta_weight(self, layout: Layout, weight: Tensor) -> Tensor:
        """Return dW, without the scale."""
        return self.method.delta_weight(
            layout, self.chosen_block(), weight, self.output_ranges, self.r
        )

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


class ShardSumTerm(NamedTuple):
    """s R, the factor by which updates multiply S(x); R is (..., r, out), or (..., r, r_out)."""

    matrix: Tensor
    dropout: float
    chosen: Tensor | None = None


def shard_sum_terms(
    updates: Sequence[Update], layout: Layout, geometry: Geometry
) -> list[ShardSumTerm]:
    """Return the terms of all updates that use shard sums. Those of one shard size are added up."""
    terms: list[ShardSumTerm] = []
    # Shard size and dtype -> where in `terms` the term is to which others like it are added.
    positions: dict[tuple[int, torch.dtype], int] = {}
    for update in updates:
        if not update.method.uses_shard_sum:
            continue
        term = _shard_sum_term(update, layout, geometry)
        if term.dropout or term.chosen is not None:
            terms.append(term)  # it has a shard sum, or a choice of matrices, of its own
            continue
        size_and_dtype = term.matrix.shape[-2], term.matrix.dtype
        if size_and_dtype in positions:
            position = positions[size_and_dtype]
            former = tiled(terms[position].matrix, geometry.out_features)
            matrix = former + tiled(term.matrix, geometry.out_features)
            terms[position] = ShardSumTerm(matrix, dropout=0.0)
        else:
            positions[size_and_dtype] = len(terms)
            terms.append(term)
    return terms


def _shard_sum_term(update: Update, layout: Layout, geometry: Geometry) -> ShardSumTerm:
    """Return s R of one update, with zeros for the outputs that it does not adapt."""
    method = update.method
    outputs = geometry.out_features
    stack = geometry.stack
    if update.output_ranges:
        outputs = sum([stop - first for first, stop in update.output_ranges])
    if update.chosen is not None:
        # The weight has only the chosen matrices, and the block has all of them.
        stack = method.stack_of(layout, update.block.shape)
    matrix = method.shard_sum_factor(
        method.matrix_block(layout, update.block),
        Geometry(geometry.in_features, outputs, stack),
        update.r,
    )
    if update.output_ranges:
        matrix = tiled(matrix, outputs)
        matrix = place_outputs(matrix, update.output_ranges, geometry.out_features, dim=-1)
    return ShardSumTerm(scaled(matrix, update.scale), update.dropout, update.chosen)
