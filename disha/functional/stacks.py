"""Products of stacks of matrices, such as experts, with their updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from disha.functional.layouts import STACK
from disha.functional.linear import adapted_linear
from disha.functional.low_rank import multiply_stack
from disha.functional.products import adapted_product
from disha.functional.shard_sums import pad_to_multiple, without_autocast
from disha.functional.update import Update


def adapted_stack(x: Tensor, weight: Tensor, updates: Sequence[Update]) -> Tensor:
    """Return x (W + sum of s dW)^T for a stack of matrices W (experts, out, in).

    x is (experts, n, in), or (1, n, in) if all matrices have the same input.
    """
    has_folded = any(not update.method.low_rank and not update.dropout for update in updates)
    if has_folded and weight.shape[0] and not is_compiling():
        # Such an update is folded into W, which takes a dense copy. So it is one of each matrix.
        if x.shape[0] == 1:
            x = x.expand(weight.shape[0], -1, -1)
        if x.shape[0] == weight.shape[0]:
            return torch.stack(_multiply_one_by_one(x, weight, updates))
    return adapted_product(multiply_stack, x, weight, None, STACK, updates)


def _multiply_one_by_one(x: Tensor, weight: Tensor, updates: Sequence[Update]) -> list[Tensor]:
    """Return the product of each matrix of a stack with its own input."""
    by_matrix = zip(*[update.unstack() for update in updates])
    return [
        adapted_linear(inputs, matrix, None, updates_of_matrix)
        for inputs, matrix, updates_of_matrix in zip(x.unbind(0), weight.unbind(0), by_matrix)
    ]


def adapted_grouped(
    multiply: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    updates: Sequence[Update],
) -> Tensor:
    """Return the grouped product x (W_e + sum of s dW_e)^T, where e is the matrix of a token.

    The tokens of a matrix are one run of x (tokens, in), which ends before token `offsets[e]`.
    An update with shard sums takes one more grouped product: that of S(x) with its blocks.
    """
    if not is_compiling() and not all(update.method.low_rank for update in updates):
        return _multiply_runs(x, weight, offsets, updates)

    def multiply_grouped(inputs: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
        outputs = matrices.shape[-2]
        if matrices is not weight:
            # A or R. Torch wants strides of a multiple of 16 bytes, so r is padded.
            multiple = 16 // x.element_size()
            inputs = pad_to_multiple(inputs, multiple, dim=-1)
            matrices = pad_to_multiple(matrices, multiple, dim=-1)
            matrices = pad_to_multiple(matrices, multiple, dim=-2).contiguous()
        output = multiply(inputs, torch.transpose(matrices, -2, -1), offs=offsets)
        return output[..., :outputs] if output.shape[-1] > outputs else output

    return adapted_product(multiply_grouped, x, weight, None, STACK, updates)


def _multiply_runs(x: Tensor, weight: Tensor, offsets: Tensor, updates: Sequence[Update]) -> Tensor:
    """Return the grouped product, computed by one product for each matrix that has tokens."""
    outputs = []
    start = 0
    by_matrix = list(zip(*[update.unstack() for update in updates]))
    with without_autocast(x):  # autocast does not cast grouped products
        for index, stop in enumerate(offsets.tolist()):
            # A matrix without tokens is left out. But if none has any, torch.cat still needs an
            # output, so all give an empty one.
            if stop > start or not x.shape[0]:
                tokens = x[start:stop]
                outputs.append(adapted_linear(tokens, weight[index], None, by_matrix[index]))
            start = stop
    if start < x.shape[0]:  # the remaining tokens belong to no matrix
        outputs.append(x.new_zeros(x.shape[0] - start, weight.shape[-2]))
    return torch.cat(outputs)
