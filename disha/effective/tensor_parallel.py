"""The updates of a weight that a tensor-parallel plan has cut, and products with them.

A product is that of each rank's part of W and of the update (`sharding.tensor_parallel`), as it is
in one process, and the rest is as DTensor has it: the inputs that a rank needs, and what its output
is. `w` is the dimension of W that is cut:

    w                          the rank's input       its output
    that of the outputs        all                    a shard
    that of the inputs         a shard, or indices    a term of a sum
    none                       as it is               as the input

So a product communicates as one with W does. Whatever is no product gets W + sum of s dW, of which
each rank computes its part.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from disha.effective.weight import EffectiveWeight, compute, make_effective
from disha.errors import ModeError
from disha.functional import Layout, Update
from disha.functional.layouts import MATRIX
from disha.functional.lookups import is_lookup
from disha.functional.low_rank import Product
from disha.functional.new_rows import ChangeRows, NewRows
from disha.functional.parts import update_of_part
from disha.functional.weight_updates import Change, Updates
from disha.sharding.ranks import random_numbers_by_input
from disha.sharding.tensor_parallel import Split, split_of
from disha.sharding.tensors import is_sharded


class SplitUpdates(Updates):
    """The updates of a weight that is a DTensor."""

    shared = None

    def __init__(self, updates: Updates) -> None:
        self.updates = updates
        self.acts = updates.acts
        self.is_routed = updates.is_routed

    @property
    def blocks(self) -> list[Tensor]:
        """The block of each update."""
        return self.updates.blocks

    def map(self, change: Change, change_rows: ChangeRows) -> Updates | None:
        """Return None: a view of a DTensor is that of the computed weight."""
        return None

    def transposed(self) -> Updates:
        """Return the updates of the transposed weight, whose layout tells the rest."""
        return SplitUpdates(self.updates.transposed())

    def compute_weight(self, weight: Any, layout: Layout) -> Tensor:
        """Return W + sum of s dW, a DTensor as W is."""
        split = split_of(weight)
        assert split is not None
        return split.make_whole(compute(self.effective_part(weight, layout)))

    def effective_part(self, weight: Any, layout: Layout) -> EffectiveWeight:
        """Return the effective weight of this rank's part."""
        split = split_of(weight)
        assert split is not None
        return effective_part(weight, split, layout, self.updates)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product of a linear layer, whose weight is (out, in)."""
        return self.product(F.linear, x, weight, bias, MATRIX)

    def product(
        self, multiply: Product, x: Tensor, weight: Any, bias: Tensor | None, layout: Layout
    ) -> Tensor:
        """Return a product as `functional.adapted_product` does, of DTensors."""
        operands = [x] if bias is None else [x, bias]
        if not all(map(is_sharded, operands)):  # torch refuses plain tensors beside a DTensor
            return multiply(x, self.compute_weight(weight, layout), bias)
        split = split_of(weight)
        assert split is not None
        looks_up = is_lookup(x)
        plan = _plan_product(split, x, looks_up)
        tokens_cut = [placement.is_shard() for placement in plan.of_tokens]
        part = effective_part(weight, split, layout, self.updates, tokens_cut)
        local_x = _redistribute(x, plan.of_input).to_local(grad_placements=plan.of_input_gradient)
        masks: AbstractContextManager[None] = nullcontext()
        if self.updates.drops_inputs:
            masks = random_numbers_by_input(split.device_mesh, plan.of_input, local_x.device)
        with masks:
            if looks_up:
                output = _look_up_in_part(local_x, part, split.part[0])
            else:
                output = _multiply_by_part(local_x, part, _bias_of_rank(bias, plan))
        width = weight.shape[1] if looks_up else weight.shape[0]
        tokens = x.shape if looks_up else x.shape[:-1]
        return Split(split.device_mesh, plan.of_output, (*tokens, width)).make_whole(output)


class _Plan(NamedTuple):
    """How a product is cut, for each dimension of the mesh."""

    of_input: tuple[Any, ...]
    of_input_gradient: tuple[Any, ...]
    of_output: tuple[Any, ...]
    of_tokens: tuple[Any, ...]  # of the input, but for its features
    of_bias: tuple[Any, ...]


def _plan_product(split: Split, x: Any, looks_up: bool) -> _Plan:
    """Return how a product of x with a cut weight is cut."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    last = x.dim() if looks_up else x.dim() - 1  # the dimension of the features, in the output
    dim_of_inputs = 0 if looks_up else 1
    everywhere, term, features = Replicate(), Partial(), Shard(last)
    cuts: list[tuple[Any, ...]] = []
    for of_weight, of_x in zip(split.placements, x.placements, strict=True):
        if of_weight.is_shard(dim_of_inputs):
            of_input = everywhere if looks_up else features
            cuts.append((of_input, of_input, term, everywhere, everywhere))
        elif of_weight.is_shard():
            cuts.append((everywhere, term, features, everywhere, Shard(0)))
        else:
            has_other_tokens = of_x.is_shard() and of_x.dim != last
            of_input = of_x if has_other_tokens else everywhere
            cuts.append((of_input, of_input, of_input, of_input, everywhere))
    return _Plan(*zip(*cuts))


def _redistribute(x: Any, placements: Sequence[Any]) -> Any:
    is_placed = tuple(x.placements) == tuple(placements)
    return x if is_placed else x.redistribute(placements=placements)


def _multiply_by_part(x: Tensor, part: EffectiveWeight, bias: Tensor | None) -> Tensor:
    layout = part.weight_layout
    if layout == MATRIX:
        return part.updates.linear(x, part.base, bias)
    return part.updates.product(F.linear, x, part.base, bias, layout)


def _look_up_in_part(indices: Tensor, part: EffectiveWeight, rows: tuple[int, int]) -> Tensor:
    """Return what a rank's rows of a table give to a lookup; zeros for those of other ranks."""
    start, stop = rows
    if start == stop:
        nothing = compute(part).sum(0)  # with the graph: the rank joins the sums of gradients
        return nothing.expand(*indices.shape, -1)
    layout = part.weight_layout

    def look_up(indices: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
        return F.embedding(indices, table, layout.padding_idx)

    is_elsewhere = (indices < start) | (indices >= stop)
    indices = (indices - start).masked_fill(is_elsewhere, 0)
    output = part.updates.product(look_up, indices, part.base, None, layout)
    return output.masked_fill(is_elsewhere.unsqueeze(-1), 0.0)


def _bias_of_rank(bias: Any, plan: _Plan) -> Tensor | None:
    """Return what a rank adds to its output."""
    from torch.distributed.tensor import Partial

    if bias is None:
        return None
    gradients = [
        Partial() if of_tokens.is_shard() else of_bias
        for of_bias, of_tokens in zip(plan.of_bias, plan.of_tokens, strict=True)
    ]
    local = _redistribute(bias, plan.of_bias).to_local(grad_placements=gradients)
    sizes = [
        bias.device_mesh.size(dim) for dim, own in enumerate(plan.of_output) if own.is_partial()
    ]
    if not sizes:
        return local
    # Each term of the sum has an equal share of b, as torch does it. Its gradient is that of b.
    share = local.detach() / prod(sizes)
    return share + (local - local.detach()) if local.requires_grad else share


def effective_part(
    weight: Any, split: Split, layout: Layout, updates: Updates, tokens_cut: Sequence[bool] = ()
) -> EffectiveWeight:
    """Return the effective weight of this rank's part of a weight with these updates.

    `tokens_cut` says for each dimension of the mesh whether its ranks have different tokens.
    """
    if not tokens_cut:
        tokens_cut = [False] * len(split.placements)

    def cut_blocks(whole: Sequence[Update]) -> Sequence[Update] | None:
        updates_of_part: list[Update] = []
        for update in whole:
            cut = _cut_update(update, split, layout, tokens_cut)
            if cut is None:
                return None
            updates_of_part.extend(cut)
        return updates_of_part

    def cut_rows(rows: NewRows) -> NewRows:
        # A rank that has none of the rows takes part in the sum of their gradients too.
        return rows.replace(block=split.read_block(rows.block, tokens_cut)).of_part(split.part)

    of_rank = updates.map(cut_blocks, cut_rows)
    if of_rank is None:
        raise ModeError(
            f"an adapter can't act: its weight is placed as {split.placements}, and its block "
            "can't be cut in the same way; inject after the weight is placed"
        )
    local = weight.to_local() if is_sharded(weight) else weight
    return make_effective(local, layout.of_part(split.part), of_rank)


def _cut_update(
    update: Update, split: Split, layout: Layout, tokens_cut: Sequence[bool]
) -> list[Update] | None:
    """Return the updates of this rank's part of a weight, or None if the block can't be cut."""
    held = split.held_part(update.block)
    sizes = [stop - first for first, stop in held]
    part = [(start - first, stop - first) for (start, stop), (first, _) in zip(split.part, held)]
    local = update.replace(block=split.read_block(update.block, tokens_cut))
    return update_of_part(local, layout, sizes, part)


def cut_like(split: Split, update: Update, layout: Layout) -> Split:
    """Return how the block of an update is cut: like W, where each rank needs one chunk of it."""
    from torch.distributed.tensor import Replicate, Shard

    block = update.block
    placements: list[Any] = [Replicate() for _ in split.placements]
    for weight_dim in range(len(split.shape)):
        is_cut = [placement.is_shard(weight_dim) for placement in split.placements]
        parts = split.only_where(is_cut).parts
        for block_dim in range(block.dim()):
            cut = [Shard(block_dim) if cuts else Replicate() for cuts in is_cut]
            chunks = Split(split.device_mesh, tuple(cut), tuple(block.shape))
            if any(is_cut) and _are_chunks(update, layout, split.shape, parts, chunks.parts):
                placements = [
                    new if cuts else former for new, former, cuts in zip(cut, placements, is_cut)
                ]
    return Split(split.device_mesh, tuple(placements), tuple(block.shape))


def _are_chunks(
    update: Update,
    layout: Layout,
    shape: Sequence[int],
    parts: Sequence[Sequence[tuple[int, int]]],
    chunks: Sequence[Sequence[tuple[int, int]]],
) -> bool:
    """Whether the updates of all parts of a weight are of these chunks of the block."""
    if update.output_ranges:
        return False  # the block has not all outputs, so its chunks are not those of W
    for part, chunk in zip(parts, chunks, strict=True):
        cut = update_of_part(update, layout, shape, part)
        if cut is None or len(cut) != 1 or cut[0].method is not update.method:
            return False
        if list(cut[0].block.shape) != [stop - start for start, stop in chunk]:
            return False
    return True
