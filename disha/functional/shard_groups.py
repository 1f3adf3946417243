"""Groups of shards: an output sees the shards of its own group, and not all of them.

With g groups, shard b is in group b mod g, and output o in group o mod g:

    dW[o, i] = D[i mod r, o]   if (i // r) mod g = o mod g,   else 0

The block D (r, out) is that of Bone, and so is the number of multiplications, but the rank of dW
rises to g r. With one group, it is Bone. Written with shard sums, dW x = S(x) R, where S(x) has the
size g r and R has zeros:

    R[k r + j, o] = D[j, o]    if o mod g = k,                else 0

`group_product` multiplies no zeros: for each group k, it multiplies the part k of S(x) by the
columns of D of the outputs in group k. For the backward pass, autograd saves S(x) and D, and
never x.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from disha.functional.shard_sums import Scale, add_to, overflow_safe_shard_sum, scaled, shard_count
from disha.private_torch import any_autocast, must_not_write

LARGE_OUTPUT = 2**18
"""From this many numbers on, processors add group by group, without gradients.

New memory of the size of the output costs them more time than a product for each group.
"""


def group_count(groups: int | None, in_features: int, block: Tensor) -> int:
    """Return the number of groups of a weight: `groups`, or the largest possible one for None.

    With more groups than shards, some outputs would see no shard. With more groups than outputs,
    some shards would be seen by no output.
    """
    r, outputs = block.shape[-2:]
    largest = min(shard_count(in_features, r), outputs)
    return largest if groups is None else min(groups, largest)


def group_factor(block: Tensor, groups: int) -> Tensor:
    """Return R (..., g r, out) of a block D (..., r, out)."""
    if groups == 1:
        return block
    group = torch.arange(groups, device=block.device)
    group_of_output = torch.arange(block.shape[-1], device=block.device) % groups
    sees = group_of_output == group[:, None, None]  # (g, 1, out)
    return torch.where(sees, block.unsqueeze(-3), 0.0).flatten(-3, -2)


def group_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    block: Tensor,
    scale: Scale,
    groups: int,
    with_base: bool = True,
) -> Tensor:
    """Return (W + s dW) x + b; or without `with_base`, the update alone: s dW x.

    x is (n, in) and W (out, in); or x is (experts, n, in), or (1, n, in) if all experts have the
    same input, and W is (experts, out, in).
    """
    size = groups * block.shape[-2]
    if x.shape[-1] % size or x.dtype == torch.float16 or any_autocast():
        sums, overflow_scale = overflow_safe_shard_sum(x, size)
    else:
        # W x and S(x) read the same view. So in backward, the gradient of S(x) is added to that of
        # W x as it is, and not repeated in memory first.
        shards = torch.unflatten(x, -1, (-1, size))
        # The sum of one shard is x itself, and summing would copy it.
        sums = shards.sum(-2) if x.shape[-1] > size else shards.squeeze(-2)
        x = shards.flatten(-2)
        overflow_scale = 1.0
    block = block.to(x.dtype)
    output = _multiply_by_weight(x, weight, bias) if with_base else None
    if output is not None and _is_added_group_by_group(output, sums, scale):
        _add_group_by_group(output, sums, block, groups, scale * overflow_scale)
        return output
    delta = _multiply_by_groups(scaled(sums, scale), block, groups)
    delta = scaled(delta, overflow_scale)
    return delta if output is None else add_to(output, delta)


def _multiply_by_weight(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias) if weight.dim() == 2 else torch.matmul(x, weight.mT)


def _is_added_group_by_group(output: Tensor, sums: Tensor, scale: Scale) -> bool:
    """Whether to add the update to a new output in place, one group after another."""
    return (
        output.device.type == "cpu"
        and output.numel() >= LARGE_OUTPUT
        and not torch.is_grad_enabled()
        and output.dtype == sums.dtype
        and not isinstance(scale, Tensor)
        and not is_compiling()
        and not must_not_write()
    )


def _add_group_by_group(
    output: Tensor, sums: Tensor, block: Tensor, groups: int, factor: Scale
) -> None:
    """Add the factor times S(x) R to an output in place."""
    r = block.shape[-2]
    for group in range(groups):
        part = sums[..., group * r : (group + 1) * r]
        product = torch.matmul(part, block[..., group::groups])
        output[..., group::groups].add_(product, alpha=factor)  # type: ignore[arg-type]


def _multiply_by_groups(sums: Tensor, block: Tensor, groups: int) -> Tensor:
    """Return S(x) R, as one batch of products: one for each group."""
    r, outputs = block.shape[-2:]
    last = outputs % groups
    if last:
        # The last outputs are fewer than the groups: one in each of the first groups.
        first_outputs = _multiply_by_groups(sums, block[..., :-last], groups)
        last_outputs = _multiply_by_groups(sums[..., : last * r], block[..., -last:], last)
        return torch.cat([first_outputs, last_outputs], -1)
    parts = torch.unflatten(sums, -1, (groups, r)).transpose(-3, -2)  # (..., g, n, r)
    columns = torch.unflatten(block, -1, (-1, groups)).movedim(-1, -3)  # (..., g, r, out / g)
    return torch.matmul(parts, columns).movedim(-3, -1).flatten(-2)
