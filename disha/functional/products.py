"""Products of inputs with a weight and its updates: W x + b + sum of s dW x.

Each function returns the product with the effective weight W + sum of s dW, and avoids forming
that weight where possible. There are four cases:

- the method uses shard sums, so dW x = S(x) R: the same product of S(x) with R, a smaller weight,
  is added;
- the method uses shard sums, but has something that costs less than R: what it computes is added.
  In a lookup, this is `Method.look_up`; in a linear layer, `Method.product` if the method
  `prefers_product`;
- any other method: dW is folded into W, so there is one product;
- any other method, where dropout gives the update its own input: the product with dW is added.

Every dW comes from the original W, so the order of updates does not matter.

Here is any product of any layout. `linear` has the product of a linear layer, and `stacks` those of
experts. Both avoid more memory and time than the general case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils.checkpoint import checkpoint

from disha.functional.convolutions import overflow_safe_channel_sum
from disha.functional.dropout import drop_inputs, drop_tokens
from disha.functional.layouts import MATRIX, Geometry, Layout, place_outputs
from disha.functional.lookups import is_lookup
from disha.functional.shard_sums import add_to, overflow_safe_shard_sum, scaled, shard_count, tiled
from disha.functional.update import ShardSumTerm, Update, computed_weight, shard_sum_terms
from disha.private_torch import must_not_write

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(input, weight, bias or None) -> the product. Everything else, such as a stride, is fixed.

Callers pass `F.linear` itself for a linear layer, so `multiply is F.linear` recognises it. A
product that is not recognised gives the same numbers, and only takes more memory.
"""


def adapted_product(
    multiply: Product,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: Layout,
    updates: Sequence[Update],
) -> Tensor:
    """Return a product of x with W + sum of s dW, plus b.

    The shapes depend on the layout and on what `multiply` does:

        layout             product        x                        result
        out in             linear         (..., in)                (..., out)
        out in             lookup         (...), of outputs        (..., in)
        index out, in out  lookup         (...), of inputs         (..., out)
        index out, in out  linear         (..., out)               (..., in)
        with *kernel       convolution    (..., in, *positions)    (..., out, *positions)

    A lookup in "out in" occurs where an embedding reads the weight of an output head, and a linear
    product with "index out" where the head reads that of the embedding.
    """
    geometry = layout.geometry(weight.shape)
    with_factor, folded, separate = sort_updates(multiply, x, layout, updates)
    terms = shard_sum_terms(with_factor, layout, geometry)
    effective = computed_weight(weight, layout, folded) if folded else weight
    output = multiply(x, effective, bias)
    for term in terms:
        output = add_to(output, _shard_sum_product(multiply, x, layout, term, geometry))
    for update in separate:
        output = add_to(output, update_product(multiply, x, weight, layout, update))
    return output


def sort_updates(
    multiply: Product, x: Tensor, layout: Layout, updates: Sequence[Update]
) -> tuple[list[Update], list[Update], list[Update]]:
    """Return the updates that act by R, those folded into W, and those added by themselves.

    Updates that act by R can be added up first, if they have one shard size.
    """
    with_factor = []
    folded = []
    separate = []
    for update in updates:
        if update.method.uses_shard_sum:
            if _looks_up_inputs(x, layout) or _prefers_product(multiply, layout, update):
                separate.append(update)
            else:
                with_factor.append(update)
        elif update.dropout:  # then it can't be folded
            separate.append(update)
        else:
            folded.append(update)
    return with_factor, folded, separate


def update_product(
    multiply: Product, x: Tensor, weight: Tensor, layout: Layout, update: Update
) -> Tensor:
    """Return the product of x with s dW of one update, with its dropout."""
    if _prefers_product(multiply, layout, update):
        inputs = drop_inputs(x, update.dropout) if update.dropout else x
        product = _product_without_delta(inputs, weight, update)
        assert product is not None
        return product
    if update.method.uses_shard_sum and _looks_up_inputs(x, layout):
        return _look_up_update(x, weight, layout, update)
    geometry = layout.geometry(weight.shape)
    terms = shard_sum_terms([update], layout, geometry)
    if terms:
        return _shard_sum_product(multiply, x, layout, terms[0], geometry)
    if is_lookup(x):
        delta = scaled(update.delta_weight(layout, weight), update.scale)
        return drop_tokens(multiply(x, delta.to(weight.dtype), None), update.dropout)
    if update.dropout:
        x = drop_inputs(x, update.dropout)
    if multiply is F.linear and layout == MATRIX and not update.output_ranges:
        product = _product_without_delta(x, weight, update)
        if product is not None:
            return product
    delta = scaled(update.delta_weight(layout, weight), update.scale)
    return multiply(x, delta.to(x.dtype), None)


def _prefers_product(multiply: Product, layout: Layout, update: Update) -> bool:
    """Whether a product is one of a linear layer, which the method computes at a lower cost."""
    return update.method.prefers_product and multiply is F.linear and layout == MATRIX


def _looks_up_inputs(x: Tensor, layout: Layout) -> bool:
    """Whether a product is a lookup in a table that has a row for each input of dW."""
    return is_lookup(x) and layout.in_first


def _look_up_update(indices: Tensor, weight: Tensor, layout: Layout, update: Update) -> Tensor:
    """Return what an update with shard sums adds to the rows of a table that indices choose."""
    geometry = layout.geometry(weight.shape, update.output_ranges)
    delta = update.method.look_up(indices, update.block, geometry, update.r)
    delta = place_outputs(delta, update.output_ranges, weight.shape[1], dim=-1)
    if layout.padding_idx is not None:
        delta = delta.masked_fill((indices == layout.padding_idx).unsqueeze(-1), 0.0)
    return drop_tokens(scaled(delta, update.scale), update.dropout)


def _product_without_delta(x: Tensor, weight: Tensor, update: Update) -> Tensor | None:
    """Return s dW x of a linear layer if the method computes it without dW, or None."""
    inputs = x.reshape(-1, x.shape[-1])
    method = update.method
    if method.reads_weight:  # of any other method, W may be one number in memory
        weight = weight.to(x.dtype)
    output = method.product(inputs, weight, None, update.block, update.scale, with_base=False)
    if output is None:
        return None
    output = place_outputs(output, update.output_ranges, weight.shape[0], dim=-1)
    return output.view(*x.shape[:-1], weight.shape[0])


def _shard_sum_product(
    multiply: Product, x: Tensor, layout: Layout, term: ShardSumTerm, geometry: Geometry
) -> Tensor:
    """Return s S(x) R: the product of the shard sums with a smaller weight of the same layout."""
    matrix, dropout, chosen = term
    outputs = geometry.out_features
    looks_up = is_lookup(x)
    if not looks_up:
        matrix = matrix.to(x.dtype)
        if dropout:
            x = drop_inputs(x, dropout)
    # What is multiplied, by the layout and the product:
    #
    #                            linear    lookup
    #   out in                   S(x) R    x R^T
    #   in out, index out        x R^T     S(x) R, in `_look_up_update`
    #
    # Two of these use the transposed weight, as where an output head and an embedding share it.
    # Stacks and convolutions are never used like that.
    is_transposed = layout.in_first != looks_up and len(layout.axes) == 2
    if is_transposed:
        delta = _transposed_shard_sum_product(multiply, x, layout, matrix, geometry)
        return drop_tokens(delta, dropout) if looks_up else delta
    r = matrix.shape[-2]
    if layout.has_kernel:
        sums, overflow_scale = overflow_safe_channel_sum(x, r, layout, geometry)
    else:
        sums, overflow_scale = overflow_safe_shard_sum(x, r)
    if multiply is not F.linear:
        matrix = tiled(matrix, outputs)
    if chosen is None:
        output = multiply(sums, layout.weight(matrix.mT), None)
    else:
        output = _multiply_by_chosen(multiply, sums, layout, matrix, chosen)
    output = scaled(output, overflow_scale)
    # A linear tile is repeated after the product, so backward keeps no matrix of that size.
    return tiled(output, outputs) if multiply is F.linear else output


def _multiply_by_chosen(
    multiply: Product, sums: Tensor, layout: Layout, matrix: Tensor, chosen: Tensor
) -> Tensor:
    """Return the product of shard sums with the chosen matrices of a stack."""

    def multiply_sums(sums: Tensor, matrix: Tensor) -> Tensor:
        return multiply(sums, layout.weight(matrix[chosen].mT), None)

    if is_compiling() or must_not_write():
        return multiply_sums(sums, matrix)
    # Backward gathers the matrices again, so it does not keep one for each token.
    return checkpoint(multiply_sums, sums, matrix, use_reentrant=False, preserve_rng_state=False)


def _transposed_shard_sum_product(
    multiply: Product, x: Tensor, layout: Layout, matrix: Tensor, geometry: Geometry
) -> Tensor:
    """Return s x R^T, repeated over the shards of the inputs: a product with the transposed dW."""
    inputs = geometry.in_features
    r = matrix.shape[-2]
    delta = multiply(x, layout.weight(tiled(matrix, geometry.out_features).mT), None)  # (..., r)
    delta = tiled(delta, shard_count(inputs, r) * r)[..., :inputs]
    if layout.padding_idx is not None:
        delta[..., layout.padding_idx] = 0.0
    return delta
