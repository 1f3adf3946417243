"""A linear layer and a block as one differentiable product, which keeps as little as it can.

Plain autograd computes the same (`bone_forward`, `bat_forward`) and is what transforms of
`torch.func`, forward-mode derivatives and compiled graphs get. Here:

- Bone, y = W x + b + S(x) D: the second product is added into the first. Backward needs W, D and
  S(x), tokens x r, never x; dS = dY D^T is added into every shard of dX = dY W.
- BAT, y = W_eff x + b: backward needs x, W and D, and forms W_eff again. It and the gradient of the
  weight, from which dD comes, are formed one slab of output blocks at a time, never whole if they
  are large. For few tokens, and without gradients, the forward does not form W_eff at all:
  y_a = sum over b of W_ab (I + D_a) x_b + D_a S(x) reads W once, in order, against (out / r) small
  copies of x.

W is frozen: its own gradient is left to plain autograd.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from disha.functional.shards import (
    Scale,
    pad_to_multiple,
    scaled_sums,
    shard_sum,
    shrinking,
    square_tiles,
    tile_count,
    without_autocast,
)

__all__ = [
    "SLAB_BYTES",
    "autocasts",
    "bat_linear",
    "bone_linear",
    "fusible",
    "gathered_product",
    "streams",
]

SLAB_BYTES = 2**23
"""How much of W_eff, and of the weight's gradient, BAT holds at once: a block at least."""

W_FIRST_TOKENS = 16
"""From so many tokens streaming multiplies W by x, below that x by W: where a batch of products was
measured to take the libraries up to twice as long from one token to the next, but not in 16 bits.
"""

STREAMED_SHARE = 0.75
"""How many tokens stream, as a share of r: where the two ways were measured to take as long."""


_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_transformed = torch._C._are_functorch_transforms_active
_casts_somewhere = torch._C._is_any_autocast_enabled


def fusible(x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor) -> bool:
    """Whether the products here apply to these operands; where not, plain autograd does.

    Args:
        x: input.
        weight: W.
        bias: b, or None.
        block: D.
    """
    if type(x) not in _PLAIN or type(weight) not in _PLAIN or type(block) not in _PLAIN:
        return False
    dtype = x.dtype
    return (
        weight.dtype is dtype
        and block.dtype is dtype
        and (bias is None or bias.dtype is dtype)
        and not weight.requires_grad
        and weight.ndim == 2
        and not x.is_meta
        and (weight.is_contiguous() or weight.mT.is_contiguous())
        and not _transformed()
        and forward_ad._current_level < 0
        and not is_compiling()
    )


def _autocasted(
    x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return the operands as a product under autocast would see them."""
    if not autocasts(x.device) or x.dtype == torch.float64:
        return x, weight, bias, block
    dtype = torch.get_autocast_dtype(x.device.type)
    bias = None if bias is None else bias.to(dtype)
    return x.to(dtype), weight.to(dtype), bias, block.to(dtype)


def autocasts(device: torch.device) -> bool:
    """Return whether products of operands on a device are cast now; not for compiled code.

    Args:
        device: where the operands are.

    Examples:
        >>> import torch
        >>> from disha.functional.fused import autocasts
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     autocasts(torch.device("cpu"))
        True
    """
    kind = device.type
    # This takes a fifth of the other question's time and mostly answers it, but not of all devices.
    if kind in ("cpu", "cuda") and not _casts_somewhere():
        return False
    return kind != "meta" and torch.is_autocast_enabled(kind)


def bone_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor, scale: Scale = 1.0
) -> Tensor | None:
    """Return W x + b + s S(x) D, as `bone_forward` does; None for operands that are not `fusible`.

    Args:
        x: input (..., in).
        weight: W (out, in), frozen.
        bias: b (out,), or None.
        block: D, (r, out) or (r, r_out).
        scale: runtime scale s.

    Returns:
        Tensor (..., out).

    Examples:
        >>> import torch
        >>> from disha.functional.fused import bone_linear
        >>> bone_linear(torch.ones(1, 4), torch.eye(4), None, torch.ones(2, 4))
        tensor([[5., 5., 5., 5.]])
    """
    if isinstance(scale, Tensor):
        return None
    casts = _casts_somewhere()
    if casts:
        x, weight, bias, block = _autocasted(x, weight, bias, block)
    if not fusible(x, weight, bias, block):
        return None
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    product = _BoneLinear.apply if torch.is_grad_enabled() else _bone_product
    if casts:
        with without_autocast(x.device):
            output: Tensor = product(rows, weight, bias, block, scale)[0]
    else:
        output = product(rows, weight, bias, block, scale)[0]
    return output if rows is x else output.view(*x.shape[:-1], weight.shape[0])


class _BoneLinear(torch.autograd.Function):
    """(x (n, in), W, b, D, s) -> y (n, out) and c s S (n, r), which double backward goes through.

    y = W x + b + (c s S) D / c, with c below 1 where a sum could overflow (`shrinking`).
    """

    # A setup_context of its own is for transforms, which are not `fusible`; binding the arguments
    # for it takes as long as a small product.
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        output, sums = _bone_product(x, weight, bias, block, scale)
        ctx.scale = scale
        ctx.save_for_backward(weight, block, sums)
        ctx.set_materialize_grads(False)
        return output, sums

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        weight, block, sums = ctx.saved_tensors
        grad, grad_sums = grads
        needs_x, _, needs_bias, needs_block, _ = ctx.needs_input_grad
        c = shrinking(weight.dtype, weight.shape[1], block.shape[0])
        grad_x = grad_bias = grad_block = None
        with without_autocast(weight.device):
            if grad_sums is not None:
                grad_sums = _times(grad_sums, c)
            if grad is not None:
                grad_bias = grad.sum(0) if needs_bias else None
                # Of a tile, what reaches D is summed over the output's shards.
                whole = block.shape[1] == grad.shape[1]
                grad_tile = grad if whole else shard_sum(grad, block.shape[1])
                # sums.T @ grad_tile, which takes some of the libraries longer
                if needs_block:
                    grad_block = _times(F.linear(sums.T, grad_tile.T), 1.0 / c)
                to_sums = grad_tile @ block.T
                grad_sums = to_sums if grad_sums is None else grad_sums + to_sums
            if needs_x and grad_sums is not None:
                total = None if grad is None else grad @ weight
                grad_x = _into_shards(total, _times(grad_sums, ctx.scale), weight)
        return grad_x, None, grad_bias, grad_block, None


def _bone_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    (tokens, in_features), (r, r_out) = x.shape, block.shape
    if in_features % r == 0 and x.dtype is not torch.float16:
        # scaled_sums with less around it
        sums = x.view(tokens, in_features // r, r).sum(1)
        if scale != 1.0:
            sums = sums * scale
        if r_out == weight.shape[0]:
            return F.linear(x, weight, bias).addmm_(sums, block), sums
        regain = 1.0
    else:
        sums, regain = scaled_sums(x, r, x.dtype, scale)
    output = F.linear(x, weight, bias)
    if r_out == weight.shape[0]:
        return output.addmm_(sums, block, alpha=regain), sums
    tile_count(block, weight.shape[0])
    tiles = output.view(-1, output.shape[1] // r_out, r_out)
    tiles.add_((sums @ block).unsqueeze(1), alpha=regain)
    return output, sums


def _times(sums: Tensor, scale: float) -> Tensor:
    return sums if scale == 1.0 else sums * scale


def _into_shards(total: Tensor | None, sums: Tensor, weight: Tensor) -> Tensor:
    """Add (n, r) into every shard of a total (n, in), in place; zeros where that is None."""
    in_features, r = weight.shape[1], sums.shape[1]
    if total is None:
        total = sums.new_zeros(sums.shape[0], in_features)
    whole = in_features - in_features % r
    shards = total[:, :whole].view(total.shape[0], whole // r, r)
    shards.add_(sums.unsqueeze(1))
    if whole < in_features:
        total[:, whole:].add_(sums[:, : in_features - whole])
    return total


def gathered_product(sums: Tensor, block: Tensor, stack: Tensor, index: Tensor) -> Tensor:
    """Return the product of sums with blocks of a stack, without keeping these for backward.

    Args:
        sums: (n, ..., r).
        block: the gathered blocks (n, r, out), `stack[index]`.
        stack: D of all matrices (experts, r, out).
        index: (n,), whose block each of the sums meets.

    Returns:
        Tensor (n, ..., out).

    Examples:
        >>> import torch
        >>> from disha.functional.fused import gathered_product
        >>> stack, index = torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([1, 0, 1])
        >>> gathered_product(torch.ones(3, 1, 1), stack[index], stack, index).flatten()
        tensor([2., 1., 2.])
    """
    if (
        not torch.is_grad_enabled()
        or is_compiling()
        or _transformed()
        or forward_ad._current_level >= 0
    ):
        return sums @ block
    if autocasts(sums.device) and sums.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(sums.device.type)
        sums, block, stack = sums.to(dtype), block.to(dtype), stack.to(dtype)
    with without_autocast(sums.device):
        product: Tensor = _GatheredProduct.apply(sums, block.detach(), stack, index)  # type: ignore[no-untyped-call]
    return product


class _GatheredProduct(torch.autograd.Function):
    """(sums (n, ..., r), stack[index] (n, r, out), stack, index) -> (n, ..., out)."""

    @staticmethod
    def forward(ctx: Any, sums: Tensor, block: Tensor, stack: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(sums, stack, index)
        return sums @ block

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        sums, stack, index = ctx.saved_tensors
        needs_sums, _, needs_stack, _ = ctx.needs_input_grad
        grad_sums = grad_stack = None
        with without_autocast(stack.device):
            if needs_sums:
                grad_sums = grads[0] @ stack[index].mT
            if needs_stack:
                each = sums.mT @ grads[0]
                grad_stack = torch.zeros_like(stack).index_add(0, index % len(stack), each)
        return grad_sums, None, grad_stack, None


def bat_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor, scale: Scale = 1.0
) -> Tensor | None:
    """Return (W + s dW) x + b with dW_ab = W_ab D_a + D_a; None where operands aren't `fusible`.

    Products are computed in the dtype of the operands: for 16 bits W_eff is rounded once, and D
    added to the output.

    Args:
        x: input (..., in).
        weight: W (out, in), frozen.
        bias: b (out,), or None.
        block: D (ceil(out / r), r, r), of W's dtype or float32.
        scale: runtime scale s.

    Returns:
        Tensor (..., out).

    Examples:
        >>> import torch
        >>> from disha.functional.fused import bat_linear
        >>> bat_linear(torch.ones(1, 2), torch.eye(2), None, torch.eye(2)[None])
        tensor([[3., 3.]])
    """
    if isinstance(scale, Tensor) or scale != 1.0:
        block = block * scale
    if block.dtype is torch.float32 and weight.dtype is not torch.float32:
        block = block.to(weight.dtype)  # W_eff is rounded to 16 bits anyway
    if _casts_somewhere():
        x, weight, bias, block = _autocasted(x, weight, bias, block)
    if not fusible(x, weight, bias, block):
        return None
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    with without_autocast(x.device):
        if torch.is_grad_enabled():
            output: Tensor = _BatLinear.apply(rows, weight, bias, block)  # type: ignore[no-untyped-call]
        elif streams(rows.shape[0], block.shape[-1]):
            output = _streamed(rows, weight, bias, block)
        else:
            output = _bat_product(rows, weight, bias, block)
    return output if rows is x else output.view(*x.shape[:-1], weight.shape[0])


class _BatLinear(torch.autograd.Function):
    """(x (n, in), W, b, D) -> y (n, out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, block)
        return _bat_product(x, weight, bias, block)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, block = ctx.saved_tensors
        with without_autocast(weight.device):
            return _bat_gradients(grads[0], x, weight, block, ctx.needs_input_grad)


def _bat_product(x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor) -> Tensor:
    slabs = list(_slabs(weight, block))
    # In 16 bits W + D would lose a small D: what D itself adds comes by S(x), as for Bone.
    whole = _is_wide(weight)
    if len(slabs) == 1:
        output = F.linear(x, _effective(slabs[0], weight, block, whole), bias)
    else:
        output = x.new_empty(x.shape[0], weight.shape[0])
        for slab in slabs:
            part = _effective(slab, weight, block, whole).T
            if bias is None:
                torch.mm(x, part, out=output[:, slab.rows])
            else:
                torch.addmm(bias[slab.rows], x, part, out=output[:, slab.rows])
    if whole:
        return output
    sums, regain = scaled_sums(x, block.shape[-1], x.dtype)
    return output.addmm_(sums, _flat(block, weight.shape[0]).T, alpha=regain)


def _bat_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, block: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Return dx, None for W, db and dD."""
    grad_x = None
    parts = []
    for slab in _slabs(weight, block):
        rows = grad[:, slab.rows]
        if needed[0]:
            effective = _effective(slab, weight, block, whole=True)
            grad_x = rows @ effective if grad_x is None else grad_x.addmm_(rows, effective)
        if needed[3]:
            parts.append(_bat_block_gradient(rows.T @ x, weight[slab.rows], block.shape[-1]))
    grad_bias = grad.sum(0) if needed[2] else None
    return grad_x, None, grad_bias, torch.cat(parts) if parts else None


def _bat_block_gradient(gradient: Tensor, weight: Tensor, r: int) -> Tensor:
    """Return dD_a = sum over b of (W_ab + I)^T G_ab from some rows of G = dY^T X and of W."""
    gradient, tiles = square_tiles(gradient, r), square_tiles(weight.contiguous(), r)
    direct = gradient.view(tiles.shape[0], r, -1, r).sum(2)
    return torch.bmm(tiles.mT, gradient) + direct


@dataclass(frozen=True)
class _Slab:
    """Some output blocks of a BAT layer, and the rows of W that they are."""

    blocks: slice
    rows: slice


def _slabs(weight: Tensor, block: Tensor) -> Iterator[_Slab]:
    """Cut a layer so that what is formed of each part's size stays within SLAB_BYTES.

    Not for the peak alone: memory beyond the allocator's threshold is mapped anew, page by page,
    each time that it is asked for.
    """
    blocks, r = block.shape[:2]
    out_features, in_features = weight.shape
    each = max(1, SLAB_BYTES // (r * in_features * weight.element_size()))
    for first in range(0, blocks, each):
        last = min(first + each, blocks)
        yield _Slab(slice(first, last), slice(first * r, min(last * r, out_features)))


def _effective(slab: _Slab, weight: Tensor, block: Tensor, whole: bool) -> Tensor:
    """Return rows of W_eff, or of W_ab + W_ab D_a only, where D itself is added elsewhere."""
    rows, own, r = weight[slab.rows], block[slab.blocks], block.shape[-1]
    tiles = square_tiles(rows.contiguous(), r)
    if whole:
        start = tiles.view(own.shape[0], r, -1, r) + own.unsqueeze(2)
        product = start.view(tiles.shape).baddbmm_(tiles, own)
    else:
        product = torch.baddbmm(tiles, tiles, own)
    # The result has the strides of W. So a block of zeros changes no bit of the layer's output.
    effective = product.view(own.shape[0] * r, -1)[: rows.shape[0], : rows.shape[1]]
    return effective.contiguous() if weight.is_contiguous() else effective.mT.contiguous().mT


def _is_wide(weight: Tensor) -> bool:
    return weight.dtype in (torch.float32, torch.float64)


def streams(tokens: int, r: int) -> bool:
    """Whether so few tokens go through a BAT layer that its forward does not form W_eff.

    Streaming costs 2 tokens x in x out multiply-adds, forming W_eff (tokens + r) x in x out.
    """
    return tokens < r * STREAMED_SHARE


def _flat(block: Tensor, out_features: int) -> Tensor:
    """Return D (out / r, r, r) as (out, r): row a r + i is row i of D_a."""
    return block.reshape(-1, block.shape[-1])[:out_features]


def _streamed(x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor) -> Tensor:
    """Return sum over b of W_ab (I + D_a) x_b + D_a S(x) for each a: W is read once, in order."""
    count, r, _ = block.shape
    tokens, out_features = x.shape[0], weight.shape[0]
    x = pad_to_multiple(x, r, dim=-1)
    # u_ab = x_b + D_a x_b for all a at once: (out / r, tokens * in / r, r)
    shards = x.reshape(1, -1, r).expand(count, -1, -1)
    moved = torch.baddbmm(shards, shards, block.mT).view(count, tokens, x.shape[1])
    sums, regain = scaled_sums(x, r, x.dtype)
    output = _rows_of_outputs(moved, weight, r)
    output = torch.addmm(output, sums, block.reshape(count * r, r).T, alpha=regain)[
        :, :out_features
    ]
    return output if bias is None else output + bias


def _rows_of_outputs(moved: Tensor, weight: Tensor, r: int) -> Tensor:
    """Return sum over b of W_ab u_ab, (tokens, out), for u (out / r, tokens, in)."""
    count, tokens, in_features = moved.shape
    rows = square_tiles(weight.contiguous(), r).view(count, r, in_features)
    if tokens >= W_FIRST_TOKENS and _is_wide(weight):
        return torch.bmm(rows, moved.mT).view(count * r, tokens).T
    return torch.bmm(moved, rows.mT).transpose(0, 1).reshape(tokens, count * r)
