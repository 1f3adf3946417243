"""The product of a linear layer with its updates: the most frequent product, so it is made fast."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from disha.functional.layouts import MATRIX, Geometry
from disha.functional.low_rank import go_down, go_up
from disha.functional.parts import updates_of_outputs
from disha.functional.products import sort_updates, update_product
from disha.functional.shard_sums import (
    add_to,
    autocasts,
    overflow_safe_shard_sum,
    scaled,
)
from disha.functional.update import Update, add_up, computed_weight
from disha.private_torch import is_tracing, modes_active, transforms_active


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
    inputs = x
    if x.dim() != 2:
        inputs = x.reshape(-1, x.shape[-1])
        if x.dim() > 2 and bias is not None and not is_compiling() and not x.is_contiguous():
            # For such an input, torch adds the bias after the product, which can round differently.
            late_bias = bias
            bias = None
    # Almost every layer has one update of all outputs, so this case has a fast path.
    is_usual = len(updates) == 1 and not updates[0].output_ranges and not updates[0].dropout
    if not is_usual:
        output = _linear_in_general(inputs, weight, bias, updates)
    elif updates[0].method.low_rank:
        output = _linear_of_low_rank(inputs, weight, bias, updates[0])
    else:
        output = _linear_by_method(inputs, weight, bias, updates[0])
    if late_bias is not None:
        output = add_to(output, late_bias)
    return output if inputs is x else output.reshape(*x.shape[:-1], weight.shape[0])


def _linear_of_low_rank(x: Tensor, weight: Tensor, bias: Tensor | None, update: Update) -> Tensor:
    """Return W x + b + s R^T (A x) for x (n, in), with one update of all outputs."""
    method = update.method
    scale = update.scale
    tokens, inputs = x.shape
    outputs = weight.shape[0]
    geometry = Geometry(inputs, outputs)
    down, up = method.factors(update.block, geometry)
    overflow_scale = 1.0
    if not isinstance(down, int):
        sums = F.linear(x, down.to(x.dtype))
    elif not isinstance(scale, float) and x.dtype != torch.float16:
        # In compiled code, s is a tensor, and becomes one loop with the sum.
        sums, overflow_scale = overflow_safe_shard_sum(x * scale, down)
        scale = 1.0
    elif inputs % down or x.dtype == torch.float16 or autocasts(x):
        sums, overflow_scale = overflow_safe_shard_sum(x, down)  # sums may overflow, or be cast
    elif inputs == down:
        sums = x
    else:
        shards = x.view(tokens, inputs // down, down)
        sums = shards.sum(1)
        if x.requires_grad and not is_tracing():
            # W x and S(x) read the same view. So in backward, the gradient of S(x) is added to that
            # of W x as it is, and not repeated in memory first. A trace needs the same operations
            # where gradients are off.
            x = shards.view(tokens, inputs)
    output = F.linear(x, weight, bias)
    if isinstance(scale, float) and overflow_scale == 1.0:
        product_scale = scale
    else:
        up = scaled(up, scale)
        product_scale = overflow_scale
    is_matrix = not method.compact and up.shape[1] == outputs
    has_one_dtype = up.dtype == sums.dtype == output.dtype
    # `must_not_write` knows better which modes matter, but it costs another two calls.
    may_write = not (is_compiling() or transforms_active() or modes_active())
    if is_matrix and has_one_dtype and may_write:
        return output.addmm_(sums, up, alpha=product_scale)  # here, to save a call for few tokens
    return method.multiply_up(sums, up, geometry, product_scale, output)


def _linear_in_general(
    x: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[Update]
) -> Tensor:
    """Return (W + sum of s dW) x + b for any updates and x (n, in)."""
    geometry = MATRIX.geometry(weight.shape)
    separate, folded = sort_updates(add_up(updates, MATRIX, geometry))
    # The updates go down before W x. So in backward, W x creates the gradient of x, and the updates
    # add to it.
    lowered = []
    deltas = []
    for update in separate:
        if update.method.low_rank:
            lowered.append(go_down(F.linear, x, MATRIX, geometry, update))
        else:
            deltas.append(update_product(F.linear, x, weight, MATRIX, update))
    output = _linear_with_folded(x, weight, bias, folded) if folded else F.linear(x, weight, bias)
    for item in lowered:
        output = go_up(F.linear, item, output)
    for delta in deltas:
        output = add_to(output, delta)
    return output


def _linear_with_folded(
    x: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[Update]
) -> Tensor:
    """Return the product with the updates, at least one, folded into W."""
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
