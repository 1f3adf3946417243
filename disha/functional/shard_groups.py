"""Groups of shards: an output sees the shards of its own group, and not all of them.

With g groups, shard b is in group b mod g, and output o in group o mod g:

    dW[o, i] = D[i mod r, o]   if (i // r) mod g = o mod g,   else 0

The block D (r, out) is that of Bone, and so is the number of multiplications, but the rank of dW
rises to g r. With one group, it is Bone. Written with shard sums, dW x = S(x) R, where S(x) has the
size g r and R has zeros:

    R[k r + j, o] = D[j, o]    if o mod g = k,                else 0

`group_product` multiplies no zeros: for each group k, it multiplies the part k of S(x) by the
columns of D of the outputs in group k. If each group has one shard, S(x) is x. Where the product
can be added to W x in place (`_AddByGroups`), autograd saves S(x) and D, and no other tensor.
Elsewhere, as in compiled code and for stacks, it is a plain product of copies by group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from disha.functional.shard_sums import (
    Scale,
    add_to,
    autocasts,
    may_define_backward,
    overflow_safe_shard_sum,
    scaled,
    shard_count,
)
from disha.private_torch import is_view


def group_count(asked: int | None, in_features: int, block: Tensor) -> int:
    """Return the number of groups that a weight has if so many are asked for: None for all.

    With more groups than shards, some outputs would see no shard. With more groups than outputs,
    some shards would be seen by no output.
    """
    r, out_features = block.shape[-2:]
    largest = min(shard_count(in_features, r), out_features)
    return largest if asked is None else min(asked, largest)


def group_factor(block: Tensor, groups: int) -> Tensor:
    """Return R (..., g r, out) of a block D (..., r, out)."""
    if groups == 1:
        return block
    group = torch.arange(groups, device=block.device)
    sees = _groups_of_outputs(block, groups) == group[:, None, None]  # (g, 1, out)
    return torch.where(sees, block.unsqueeze(-3), 0.0).flatten(-3, -2)


def group_lookup(indices: Tensor, block: Tensor, groups: int) -> Tensor:
    """Return the columns of dW that indices choose, as (..., out), without R."""
    r = block.shape[0]
    group_of_index = indices // r % groups
    sees = _groups_of_outputs(block, groups) == group_of_index.unsqueeze(-1)  # (..., out)
    return torch.where(sees, F.embedding(indices % r, block), 0.0)


def _groups_of_outputs(block: Tensor, groups: int) -> Tensor:
    """Return the number of the group of each output of a block (..., r, out)."""
    return torch.arange(block.shape[-1], device=block.device) % groups


def group_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    block: Tensor,
    scale: Scale,
    groups: int,
    with_base: bool = True,
) -> Tensor:
    """Return (W + s dW) x + b; or without `with_base`, s dW x + b: `Method.product` of the method.

    Its inputs are as they are there.
    """
    size = groups * block.shape[-2]
    overflow_scale = 1.0
    must_pad = x.shape[-1] % size != 0
    if must_pad or x.dtype == torch.float16 or autocasts(x.device):  # sums may overflow, or be cast
        sums, overflow_scale = overflow_safe_shard_sum(x, size)
    elif x.shape[-1] == size:  # one shard in each group
        sums = x
    else:
        # W x and S(x) read the same view. So in backward, the gradient of S(x) is added to that of
        # W x as it is, and not repeated in memory first.
        shards = torch.unflatten(x, -1, (-1, size))
        sums = shards.sum(-2)
        x = shards.flatten(-2)
    sums = scaled(sums, scale)
    block = block.to(x.dtype)
    if not with_base:
        output = scaled(_multiply_by_groups(sums, block, groups), overflow_scale)
        return output if bias is None else output + bias
    output = F.linear(x, weight, bias) if weight.dim() == 2 else torch.matmul(x, weight.mT)
    if overflow_scale == 1.0 and _may_write(output, sums, block):
        return _AddByGroups.apply(output, sums, block, groups)  # type: ignore[no-untyped-call]
    return add_to(output, scaled(_multiply_by_groups(sums, block, groups), overflow_scale))


def _multiply_by_groups(sums: Tensor, block: Tensor, groups: int) -> Tensor:
    """Return S(x) R, as a batch of products: one for each group."""
    products = []
    for outputs, count in _cut_into_whole_groups(block, groups):
        parts, columns = _split_operands(sums, block[..., outputs], count)
        products.append((parts @ columns).movedim(-3, -1).flatten(-2))
    return _join_outputs(products)


def _cut_into_whole_groups(block: Tensor, groups: int) -> list[tuple[slice, int]]:
    """Return ranges of outputs, and for each, a number of groups with equally many outputs.

    If g does not divide the outputs, the last ones are fewer than g: one in each of the first
    groups.
    """
    out_features = block.shape[-1]
    last = out_features % groups
    ranges = [(slice(0, out_features - last), groups)]
    if last:
        ranges.append((slice(out_features - last, out_features), last))
    return ranges


def _join_outputs(pieces: list[Tensor]) -> Tensor:
    """Return ranges of outputs beside each other. Usually there is one, which is not copied."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)


def _split_operands(sums: Tensor, block: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return the parts of S(x) and of D of the first groups: (..., g, n, r), (..., g, r, out / g).

    D has the outputs of these groups alone.
    """
    r = block.shape[-2]
    parts = torch.unflatten(sums[..., : groups * r], -1, (groups, r)).transpose(-3, -2)
    return parts, _split_outputs(block, groups)


def _split_outputs(tensor: Tensor, groups: int) -> Tensor:
    """Return the outputs of each group of a tensor (..., m, out), as (..., g, m, out / g)."""
    return torch.unflatten(tensor, -1, (-1, groups)).movedim(-1, -3)


# --- the same product, added to W x with fewer copies --------------------------------------------


def _may_write(output: Tensor, sums: Tensor, block: Tensor) -> bool:
    """Whether `_AddByGroups` can add the product to this output."""
    if output.dim() != 2:  # of a stack, g would be a second batch dimension, and `bmm` has one
        return False
    if output.dtype is not sums.dtype or not may_define_backward(output, sums, block):
        return False
    return not is_view(output)  # the last question, because the compiler can't trace it


class _AddByGroups(torch.autograd.Function):
    """(y (n, out), S(x) (n, g r), D (r, out), g) -> y + S(x) R, in place.

    A copy of the outputs costs as much time as their products. So forward makes none, and backward
    makes one: it brings the gradient of y into an order that both of its products can read.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, sums: Tensor, block: Tensor, groups: int) -> Tensor:
        ctx.save_for_backward(sums, block)
        ctx.mark_dirty(output)
        ctx.groups = groups
        for outputs, count in _cut_into_whole_groups(block, groups):
            parts, columns = _split_operands(sums, block[:, outputs], count)
            _split_outputs(output[:, outputs], count).add_(_multiply_each_group(parts, columns))
        return output

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        sums, block = ctx.saved_tensors
        _, needs_sums, needs_block, _ = ctx.needs_input_grad
        grad_sums = None
        grad_blocks = []
        for outputs, count in _cut_into_whole_groups(block, ctx.groups):
            parts, columns = _split_operands(sums, block[:, outputs], count)
            # In this order of memory, a batched product takes the gradient as it is.
            by_tokens = torch.unflatten(grad[:, outputs], -1, (-1, count)).mT.contiguous()
            grad_outputs = by_tokens.transpose(0, 1)  # (g, n, out / g)
            if needs_sums:
                grad_parts = _multiply_each_group(grad_outputs, columns.mT.conj())
                grad_parts = grad_parts.transpose(0, 1).flatten(-2)
                if grad_sums is None:
                    grad_sums = grad_parts
                else:
                    missing = sums.shape[1] - grad_parts.shape[1]
                    grad_sums = grad_sums + F.pad(grad_parts, (0, missing))
            if needs_block:
                grad_columns = parts.mT.conj() @ grad_outputs  # (g, r, out / g)
                grad_blocks.append(grad_columns.movedim(0, -1).flatten(-2))
        grad_block = _join_outputs(grad_blocks) if needs_block else None
        return grad, grad_sums, grad_block, None


def _multiply_each_group(first: Tensor, second: Tensor) -> Tensor:
    """Return the products (g, n, columns) of matrices (g, n, m) and (g, m, columns).

    In memory, all groups of a token lie beside each other, as they do in the outputs and in S(x).
    """
    if torch.is_grad_enabled():  # in a second derivative, which can't have `out`
        return first @ second
    groups, tokens, _ = first.shape
    by_tokens = first.new_empty(tokens, groups, second.shape[-1])
    return torch.bmm(first, second, out=by_tokens.transpose(0, 1))
