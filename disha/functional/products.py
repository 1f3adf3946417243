"""Products of inputs with a weight and its updates: W x + b + sum of s dW x.

Each function returns the product with the effective weight W + sum of s dW, and avoids forming
that weight where possible. There are three cases:

- the method is of low rank: R^T (A x) is added (`low_rank`);
- any other method: dW is folded into W, so there is one product;
- any other method, where dropout gives the update its own input: the product with dW is added.

Every dW comes from the original W, so the order of updates does not matter.

Here is any product of any layout. `linear` has the product of a linear layer, and `stacks` those of
experts. Both avoid more memory and time than the general case.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from disha.functional.dropout import drop_inputs, drop_tokens
from disha.functional.layouts import MATRIX, Layout
from disha.functional.lookups import is_lookup
from disha.functional.low_rank import Product, low_rank_product
from disha.functional.shard_sums import add_to, scaled
from disha.functional.update import Update, add_up, computed_weight


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
    separate, folded = sort_updates(add_up(updates, layout, geometry))
    effective = computed_weight(weight, layout, folded) if folded else weight
    output = multiply(x, effective, bias)
    for update in separate:
        output = add_to(output, update_product(multiply, x, weight, layout, update))
    return output


def sort_updates(updates: Sequence[Update]) -> tuple[list[Update], list[Update]]:
    """Return the updates that are added by a product of their own, and those folded into W."""
    separate: list[Update] = []
    folded: list[Update] = []
    for update in updates:
        is_separate = update.method.low_rank or update.dropout  # dropout can't be folded
        (separate if is_separate else folded).append(update)
    return separate, folded


def update_product(
    multiply: Product, x: Tensor, weight: Tensor, layout: Layout, update: Update
) -> Tensor:
    """Return the product of x with s dW of one update, with its dropout."""
    if update.method.low_rank:
        return low_rank_product(multiply, x, layout, layout.geometry(weight.shape), update)
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


def _product_without_delta(x: Tensor, weight: Tensor, update: Update) -> Tensor | None:
    """Return s dW x of a linear layer if the method computes it without dW, or None."""
    inputs = x.reshape(-1, x.shape[-1])
    output = update.method.product(
        inputs, weight.to(x.dtype), None, update.block, update.scale, with_base=False
    )
    if output is None:
        return None
    return output.view(*x.shape[:-1], weight.shape[0])
