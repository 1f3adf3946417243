"""The product of a linear layer with its updates: the most frequent product, so it is made fast."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from disha.functional.dropout import drop_inputs
from disha.functional.layouts import MATRIX, Geometry
from disha.functional.parts import updates_of_outputs
from disha.functional.products import sort_updates, update_product
from disha.functional.shard_sums import (
    add_to,
    autocasts,
    overflow_safe_shard_sum,
    scaled,
    shard_sum,
    tiled,
)
from disha.functional.update import Update, computed_weight, shard_sum_terms
from disha.private_torch import modes_active, must_not_write, transforms_active


def adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[Update]
) -> Tensor:
    """Return (W + sum of s dW) x + b, as cheaply as the methods allow.

    Args:
        x: input (..., in).
        weight: W (out, in).
        bias: b (out,), or None.
        updates: the blocks.

    Returns:
        Tensor (..., out), in the dtype that the plain linear layer returns.

    Examples:
        >>> import torch
        >>> from disha.functional import Update, adapted_linear, method_of
        >>> bone, bat = torch.ones(1, 2), torch.eye(2)[None]
        >>> updates = [Update(method_of("bone"), bone), Update(method_of("bat"), bat, 0.5)]
        >>> adapted_linear(torch.ones(2), torch.eye(2), None, updates)
        tensor([4., 4.])
    """
    late_bias = None
    if x.dim() > 2 and bias is not None and not is_compiling() and not x.is_contiguous():
        # For such an input, torch adds the bias after the product, which can round differently.
        late_bias = bias
        bias = None
    inputs = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    # Almost every layer has one update of all outputs, so this case has a fast path.
    is_usual = len(updates) == 1 and not updates[0].output_ranges and not updates[0].dropout
    if not is_usual:
        output = _linear_in_general(inputs, weight, bias, updates)
    elif updates[0].method.uses_shard_sum and not updates[0].method.prefers_product:
        output = _linear_with_shard_sum(inputs, weight, bias, updates[0])
    else:
        output = _linear_by_method(inputs, weight, bias, updates[0])
    if late_bias is not None:
        output = add_to(output, late_bias)
    return output if inputs is x else output.reshape(*x.shape[:-1], weight.shape[0])


def _linear_with_shard_sum(
    x: Tensor, weight: Tensor, bias: Tensor | None, update: Update
) -> Tensor:
    """Return W x + b + s S(x) R for x (n, in), with one update of all outputs."""
    tokens, inputs = x.shape
    outputs = weight.shape[0]
    scale = update.scale
    matrix = update.method.shard_sum_factor(update.block, Geometry(inputs, outputs), update.r)
    r, columns = matrix.shape
    if x.dtype == torch.float16 or autocasts(x.device):  # sums may overflow, or be cast
        sums, overflow_scale = overflow_safe_shard_sum(x, r)
        base_output = F.linear(x, weight, bias)
        return _add_product(base_output, sums, scaled(matrix, scale), overflow_scale)
    if isinstance(scale, Tensor):  # in compiled code, where s and the sum become one loop
        sums = shard_sum(x * scale, r)
        return _add_product(F.linear(x, weight, bias), sums, matrix, 1.0)
    if inputs % r:  # x must be padded
        return _add_product(F.linear(x, weight, bias), shard_sum(x, r), matrix, scale)
    shards = x.view(tokens, inputs // r, r)
    sums = shards.sum(1)
    if x.requires_grad and not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        # W x and S(x) read the same view. So in backward, the gradient of S(x) is added to that of
        # W x as it is, and not repeated in memory first. A trace needs the same operations where
        # gradients are off.
        x = shards.view(tokens, inputs)
    output = F.linear(x, weight, bias)
    # `must_not_write` knows better which modes matter, but it costs another two calls.
    may_write = not (transforms_active() or modes_active())
    if may_write and matrix.dtype == x.dtype and columns == outputs:
        return output.addmm_(sums, matrix, alpha=scale)  # here, to save a call for few tokens
    return _add_product(output, sums, matrix, scale)


def _linear_in_general(
    x: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[Update]
) -> Tensor:
    """Return (W + sum of s dW) x + b for any updates and x (n, in)."""
    with_factor, folded, separate = sort_updates(F.linear, x, MATRIX, updates)
    # The updates are computed before W x. So in backward, W x creates the gradient of x, and the
    # updates add to it.
    sums_and_matrices = []
    geometry = MATRIX.geometry(weight.shape)
    for matrix, dropout, _ in shard_sum_terms(with_factor, MATRIX, geometry):
        inputs = drop_inputs(x, dropout) if dropout else x
        sums, overflow_scale = overflow_safe_shard_sum(inputs, matrix.shape[0])
        sums_and_matrices.append((sums, matrix, overflow_scale))
    deltas = [update_product(F.linear, x, weight, MATRIX, update) for update in separate]
    output = _linear_with_folded(x, weight, bias, folded) if folded else F.linear(x, weight, bias)
    for sums, matrix, overflow_scale in sums_and_matrices:
        output = _add_product(output, sums, matrix, overflow_scale)
    for delta in deltas:
        output = add_to(output, delta)
    return output


def _add_product(output: Tensor, sums: Tensor, matrix: Tensor, factor: float) -> Tensor:
    """Return output + factor * sums @ matrix, in one operation where possible."""
    matrix = matrix.to(sums.dtype)
    if output.dtype != sums.dtype or matrix.shape[1] != output.shape[1]:
        return add_to(output, tiled(scaled(sums @ matrix, factor), output.shape[1]))
    if is_compiling() or must_not_write():
        return torch.addmm(output, sums, matrix, alpha=factor)
    return output.addmm_(sums, matrix, alpha=factor)


def _linear_with_folded(
    x: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[Update]
) -> Tensor:
    """Return the product with the updates, at least one, folded into W."""
    updates = _add_up(updates)
    if len(updates) == 1 and not updates[0].output_ranges:
        return _linear_by_method(x, weight, bias, updates[0])
    has_ranges = any(update.output_ranges for update in updates)
    # A rank that has none of the outputs must still join the all-reduce of the gradient of D. Only
    # the computed weight keeps its empty block in the graph.
    has_empty_block = any(not update.block.numel() for update in updates)
    if has_ranges and not has_empty_block:
        pieces = _pieces_between_edges(x, weight, bias, updates)
        if pieces is not None:
            return torch.cat(pieces, -1)
    return F.linear(x, computed_weight(weight, MATRIX, updates), bias)


def _add_up(updates: Sequence[Update]) -> Sequence[Update]:
    """Return the updates as one with the sum of their blocks, if they differ only in values.

    Their shard sizes are not compared, because `Method.delta` does not get r.
    """
    first = updates[0]
    if len(updates) == 1 or not first.method.additive:
        return updates
    for update in updates:
        same_method = update.method == first.method
        same_outputs = update.output_ranges == first.output_ranges
        same_shape = update.block.shape == first.block.shape
        if not (same_method and same_outputs and same_shape):
            return updates
        if update.block.dtype != first.block.dtype:
            return updates
    total = scaled(first.block, first.scale)
    for update in updates[1:]:
        total = total + scaled(update.block, update.scale)
    return [first.replace(block=total, scale=1.0)]


def _linear_by_method(x: Tensor, weight: Tensor, bias: Tensor | None, update: Update) -> Tensor:
    """Return `Method.product` with one update of all outputs, or else the update folded into W."""
    output = update.method.product(x, weight, bias, update.block, update.scale)
    if output is not None:
        return output
    return F.linear(x, computed_weight(weight, MATRIX, [update]), bias)


def _pieces_between_edges(
    x: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[Update]
) -> list[Tensor] | None:
    """Return the outputs between all edges of output ranges, or None if an edge cuts a block."""
    geometry = MATRIX.geometry(weight.shape)
    edges = {0, geometry.out_features}
    for update in updates:
        for first, stop in update.output_ranges:
            edges |= {first, stop}
    pieces = []
    for start, stop in pairwise(sorted(edges)):
        updates_here = updates_of_outputs(updates, start, stop, geometry)
        if updates_here is None:
            return None
        bias_here = None if bias is None else bias[start:stop]
        pieces.append(adapted_linear(x, weight[start:stop], bias_here, updates_here))
    return pieces
