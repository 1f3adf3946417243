"""Updates of low rank: an input goes down to k numbers for each token, and up to the outputs.

    dW = R^T A,  so  dW x = R^T (A x),  with A (k, in) and R (k, out)

A is the matrix of shard sums, of which only k is known, or any other (`Method.factors`). A and R
act as smaller weights of W's layout, so every product of W serves them too. What is computed, by
the layout and the product:

                       linear                   lookup
    out in             R^T (A x)                A^T of the columns of R
    in out, index out  A^T (R x)                R^T of the columns of A, in `Method.look_up`

Two of these use the transposed weight, as where an output head and an embedding share it. Stacks
and convolutions are never used like that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils.checkpoint import checkpoint

from disha.functional.convolutions import (
    mix_channels,
    overflow_safe_channel_sum,
    repeat_for_conv_groups,
)
from disha.functional.dropout import drop_inputs, drop_tokens
from disha.functional.layouts import Geometry, Layout, place_outputs
from disha.functional.lookups import is_lookup
from disha.functional.shard_sums import (
    add_to,
    multiply_by_matrix,
    overflow_safe_shard_sum,
    repeat_over_shards,
    scaled,
)
from disha.functional.update import Factors, Update, factors_of
from disha.private_torch import must_not_write

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(input, weight, bias or None) -> the product. Everything else, such as a stride, is fixed.

Callers pass `F.linear` itself for a linear layer, and `multiply_stack` for a stack of matrices:
their outputs lie in the last dimension, so `Method.multiply_up` can compute them. A product that is
not recognised gives the same numbers, and only takes more memory.
"""


def multiply_stack(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the products of a stack of matrices (..., out, in) with inputs (..., n, in)."""
    return torch.matmul(x, weight.mT)


def low_rank_product(
    multiply: Product, x: Tensor, layout: Layout, geometry: Geometry, update: Update
) -> Tensor:
    """Return the product of x with s dW of an update of low rank, with its dropout."""
    looks_up = is_lookup(x)
    if looks_up and layout.in_first:
        return _look_up_inputs(x, layout, geometry, update)
    if layout.in_first != looks_up and len(layout.axes) == 2:
        return _transposed_product(multiply, x, layout, geometry, update)
    if layout.has_kernel and not update.method.spans_kernel:
        factors = factors_of(update, layout, geometry)
        if not isinstance(factors.down, int):  # A and R of each position: only their product acts
            delta = layout.weight(factors.dense_up().mT @ factors.down)
            x = drop_inputs(x, update.dropout) if update.dropout else x
            return multiply(x, delta.to(x.dtype), None)
    return go_up(multiply, go_down(multiply, x, layout, geometry, update))


class Lowered(NamedTuple):
    """An input that an update has brought down to k numbers for each token."""

    sums: Tensor  # A x / f
    overflow_scale: float  # f
    factors: Factors
    layout: Layout


def go_down(
    multiply: Product, x: Tensor, layout: Layout, geometry: Geometry, update: Update
) -> Lowered:
    """Return A x of an update, with its dropout."""
    if update.dropout:
        x = drop_inputs(x, update.dropout)
    factors = factors_of(update, layout, geometry)
    down = factors.down
    overflow_scale = 1.0
    if isinstance(down, int):
        if layout.has_kernel:
            sums, overflow_scale = overflow_safe_channel_sum(x, down, geometry)
        else:
            sums, overflow_scale = overflow_safe_shard_sum(x, down)
    else:
        if layout.has_kernel:
            down = repeat_for_conv_groups(down, x, layout, geometry)
        sums = _multiply_smaller(multiply, x, down.to(x.dtype), layout, update.chosen)
    return Lowered(sums, overflow_scale, factors, layout)


def go_up(multiply: Product, lowered: Lowered, output: Tensor | None = None) -> Tensor:
    """Return s R^T (A x), added to an output if there is one, which may be written into."""
    sums, overflow_scale, factors, layout = lowered
    update = factors.update
    method = update.method
    ranges = update.output_ranges
    if update.chosen is None and (multiply is F.linear or multiply is multiply_stack):
        if not ranges:
            return method.multiply_up(sums, factors.up, factors.geometry, overflow_scale, output)
        if not method.compact:
            up = factors.dense_up()
            return multiply_by_matrix(sums, up, factors.outputs, overflow_scale, output)
        delta = method.multiply_up(sums, factors.up, factors.geometry, overflow_scale)
        delta = place_outputs(delta, ranges, factors.outputs, dim=-1)
    else:
        matrix = factors.dense_up().to(sums.dtype)
        if layout.has_kernel and method.spans_kernel:
            delta = mix_channels(sums, matrix, layout, factors.geometry)
        else:
            delta = _multiply_smaller(multiply, sums, matrix.mT, layout, update.chosen)
        delta = scaled(delta, overflow_scale)
    return delta if output is None else add_to(output, delta)


def _multiply_smaller(
    multiply: Product, x: Tensor, matrices: Tensor, layout: Layout, chosen: Tensor | None
) -> Tensor:
    """Return the product of x with a smaller weight, of matrices (..., out, in), or chosen ones."""
    if chosen is None:
        return multiply(x, layout.weight(matrices), None)

    def multiply_chosen(x: Tensor, matrices: Tensor) -> Tensor:
        return multiply(x, layout.weight(matrices[chosen]), None)

    if is_compiling() or must_not_write():
        return multiply_chosen(x, matrices)
    # Backward gathers the matrices again, so it does not keep one for each token.
    return checkpoint(multiply_chosen, x, matrices, use_reentrant=False, preserve_rng_state=False)


def _look_up_inputs(indices: Tensor, layout: Layout, geometry: Geometry, update: Update) -> Tensor:
    """Return what an update adds to the rows of a table that indices choose."""
    part_geometry = update.geometry(layout, geometry)
    delta = update.method.look_up(indices, update.block, part_geometry)
    delta = place_outputs(delta, update.output_ranges, geometry.out_features, dim=-1)
    if layout.padding_idx is not None:
        delta = delta.masked_fill((indices == layout.padding_idx).unsqueeze(-1), 0.0)
    return drop_tokens(scaled(delta, update.scale), update.dropout)


def _transposed_product(
    multiply: Product, x: Tensor, layout: Layout, geometry: Geometry, update: Update
) -> Tensor:
    """Return s A^T (R x): the product with the transposed dW, or columns of it."""
    looks_up = is_lookup(x)
    factors = factors_of(update, layout, geometry)
    down = factors.down
    up = factors.dense_up()
    if not looks_up:
        up = up.to(x.dtype)
        if update.dropout:
            x = drop_inputs(x, update.dropout)
    delta = multiply(x, layout.weight(up.mT), None)  # (..., k)
    if isinstance(down, int):
        delta = repeat_over_shards(delta, geometry.in_features)
    else:
        delta = delta @ down.to(delta.dtype)
    if layout.padding_idx is not None:
        delta[..., layout.padding_idx] = 0.0
    return drop_tokens(delta, update.dropout) if looks_up else delta
