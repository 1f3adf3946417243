"""BAT: each run of r outputs has its own block D_a, which is combined with W.

W is cut into r x r tiles W_ab (outputs a, inputs b), and dW_ab = W_ab D_a + D_a. The shape of D is
(ceil(out / r), r, r).

A product with W_eff = W + s dW and plain autograd would save W_eff for the backward pass.
`bat_linear` computes the same but saves only x, W and D. It forms W_eff one slab (a range of blocks
D_a) at a time, once in forward and again in backward. In backward, it also forms the gradient of
W_eff one slab at a time, and computes that of D from it. `bat_streamed` never forms W_eff, which is
faster for few tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from disha.errors import ArgumentError
from disha.functional.layouts import Geometry
from disha.functional.method import Method
from disha.functional.shard_sums import (
    Scale,
    is_cast,
    may_define_backward,
    merge_dtype,
    overflow_safe_shard_sum,
    pad_to_multiple,
    scaled,
    shard_count,
    without_autocast,
)

SLAB_BYTES = 2**23
"""Largest part of W_eff, or of the weight's gradient, in memory at once; at least one block."""

STREAMED_FRACTION = 0.75
"""Without gradients, `bat_linear` streams fewer than 0.75 r tokens, where the measured times cross.

By count they would cross at r: streaming takes 2 * tokens * in * out multiply-adds, forming W_eff
(tokens + r) * in * out.
"""


class _Bat(Method):
    name = "bat"
    block_axes = 3
    reads_weight = True
    additive = True

    def shape(self, geometry: Geometry, r: int, r_out: int | None) -> tuple[int, ...]:
        return (*geometry.stack, shard_count(geometry.out_features, r), r, r)

    def delta(self, block: Tensor, geometry: Geometry, matrices: Tensor | None) -> Tensor:
        assert matrices is not None
        return _delta_weight(matrices, block)

    def product(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        block: Tensor,
        scale: Scale,
        with_base: bool = True,
    ) -> Tensor | None:
        return bat_linear(x, weight, bias, block, scale, with_base)

    def of_outputs(self, block: Tensor, start: int, stop: int, geometry: Geometry) -> Tensor | None:
        size = block.shape[-1]
        if start % size or (stop % size and stop != geometry.out_features):
            return None
        return block[..., start // size : shard_count(stop, size), :, :]

    def of_inputs(self, block: Tensor, start: int, stop: int, geometry: Geometry) -> Tensor | None:
        size = block.shape[-1]
        if start % size or (stop % size and stop != geometry.in_features):
            return None
        return block


BAT = _Bat()


def _delta_weight(weight: Tensor, block: Tensor) -> Tensor:
    """Return dW of W (..., out, in) and D (..., ceil(out / r), r, r), in their dtype."""
    *stack, out_features, in_features = weight.shape
    r = block.shape[-1]
    expected = (*stack, shard_count(out_features, r), r, r)
    if block.shape != expected:
        raise ArgumentError(
            f"a BAT block for a weight of shape {tuple(weight.shape)} and r={r} has shape "
            f"{expected}, got {tuple(block.shape)}"
        )
    product = torch.unflatten(square_tiles(weight, r) @ block, -2, (r, -1))
    # (..., a, i, b, j): row i and column j of tile (a, b), which becomes output a r + i of dW.
    delta = (product + block.unsqueeze(-2)).flatten(-4, -3).flatten(-2)
    return delta[..., :out_features, :in_features]


def square_tiles(weight: Tensor, r: int) -> Tensor:
    """Return W (..., out, in) cut into r x r tiles: rearrange(W, "(a i) (b j) -> a (i b) j").

    The result T has the shape (..., out / r, in, r). Row i of tile W_ab is T[a, i * (in / r) + b].
    A size that r does not divide is zero-padded first. The numbers keep their order in memory, so
    if W is contiguous and needs no padding, the result is a view of it.
    """
    padded = pad_to_multiple(pad_to_multiple(weight, r, dim=-1), r, dim=-2)
    *stack, outputs, inputs = padded.shape
    return padded.reshape(*stack, outputs // r, inputs, r)


# --- a product that saves little for backward ----------------------------------------------------


def bat_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    block: Tensor,
    scale: Scale = 1.0,
    with_base: bool = True,
) -> Tensor | None:
    """Return y = (W + s dW) x + b for x (n, in), but save only x, W and D for backward.

    Without `with_base`, it is the update alone: y = s dW x + b.

    W must be frozen. Products are computed in the dtype of the operands. What is rounded in 16 bits
    depends on the caller, so the outputs differ by half of that dtype's precision:

    - eager code rounds W + W D, one slab at a time, and adds the product with the other part of
      dW, which is D S(x): W + D would lose a small D;
    - compiled code forms all of W_eff = W + dW at once, adds in float32, and rounds W_eff.

    The result is None where the caller must compute the dense weight: for transforms of
    `torch.func`, forward-mode derivatives, and operands of several dtypes.
    """
    if is_cast(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        bias = None if bias is None else bias.to(dtype)
        with without_autocast(x):
            return bat_linear(
                x.to(dtype), weight.to(dtype), bias, block.to(dtype), scale, with_base
            )
    block = scaled(block, scale)
    if block.dtype is not weight.dtype and block.dtype in (torch.float32, torch.complex64):
        # The usual block of a 16-bit weight: W_eff is rounded to that dtype anyway. A wider block
        # stays as it is, so that the computed weight has all of its digits.
        block = block.to(weight.dtype)
    if is_compiling() and with_base and x.dtype is weight.dtype is block.dtype:
        return F.linear(x, _form_traced(weight, block), bias)
    if not _can_apply(x, weight, block):
        return None
    if torch.is_grad_enabled():
        return _BatLinear.apply(x, weight, bias, block, with_base)  # type: ignore[no-untyped-call]
    if with_base and x.shape[0] < block.shape[-1] * STREAMED_FRACTION:
        output = bat_streamed(x, weight, block)
        return output if bias is None else output + bias
    return _multiply(x, weight, bias, block, with_base)


def _can_apply(x: Tensor, weight: Tensor, block: Tensor) -> bool:
    """Whether `_BatLinear` can compute the product."""
    has_one_dtype = x.dtype is weight.dtype is block.dtype
    if not has_one_dtype or weight.requires_grad or x.is_meta:
        return False
    if not weight.is_contiguous() and not weight.mT.is_contiguous():
        return False
    return may_define_backward(x, weight, block)


class _BatLinear(torch.autograd.Function):
    """(x (n, in), W, b, D, with_base) -> y (n, out)."""

    # A setup_context of its own would be slower, and only transforms of torch.func need one.
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor, with_base: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, block)
        ctx.with_base = with_base
        return _multiply(x, weight, bias, block, with_base)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, weight, block = ctx.saved_tensors
        needs_x, _, needs_bias, needs_block, _ = ctx.needs_input_grad
        grad_x = None
        grad_blocks = []
        slabs = _cut_into_slabs(weight, block)
        # A second derivative needs every intermediate result, so it gets no memory to share.
        scratch = None if torch.is_grad_enabled() else _new_scratch(weight, block, slabs)
        with without_autocast(weight):
            for blocks, outputs in slabs:
                grad_part = grad[:, outputs]
                # The slab of W_eff and that of its gradient are both formed in `scratch`. So the
                # first one is used up before the second one is formed.
                if needs_x:
                    slab = _form_slab(
                        weight[outputs], block[blocks], scratch, ctx.with_base, add_block=True
                    )
                    slab = slab.conj()  # of real numbers, it is the same tensor
                    grad_x = grad_part @ slab if grad_x is None else grad_x.addmm_(grad_part, slab)
                if needs_block:
                    out = _use_start(scratch, (grad_part.shape[1], x.shape[1]))
                    grad_slab = torch.mm(grad_part.T, x.conj(), out=out)
                    grad_blocks.append(_grad_of_blocks(grad_slab, weight[outputs], block.shape[-1]))
        grad_bias = grad.sum(0) if needs_bias else None
        grad_block = torch.cat(grad_blocks) if needs_block else None
        return grad_x, None, grad_bias, grad_block, None


def _multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor, with_base: bool
) -> Tensor:
    """Return the product, with one slab of W_eff in memory at a time."""
    slabs = _cut_into_slabs(weight, block)
    # In 16 bits, W + D would lose a small D. So D itself is added through S(x), as for Bone.
    add_block = weight.dtype not in (torch.float16, torch.bfloat16)
    scratch = _new_scratch(weight, block, slabs)
    if len(slabs) == 1:
        effective = _form_slab(weight, block, scratch, with_base, add_block)
        output = F.linear(x, effective, bias)
    else:
        output = x.new_empty(x.shape[0], weight.shape[0])
        for blocks, outputs in slabs:
            slab = _form_slab(weight[outputs], block[blocks], scratch, with_base, add_block).T
            if bias is None:
                torch.mm(x, slab, out=output[:, outputs])
            else:
                torch.addmm(bias[outputs], x, slab, out=output[:, outputs])
    if add_block:
        return output
    r = block.shape[-1]
    sums, overflow_scale = overflow_safe_shard_sum(x, r)
    # D (out / r, r, r) as (out, r): row a r + i is row i of D_a
    return output.addmm_(sums, block.reshape(-1, r)[: weight.shape[0]].T, alpha=overflow_scale)


def _grad_of_blocks(grad_slab: Tensor, weight: Tensor, r: int) -> Tensor:
    """Return the gradients of the blocks D_a of a slab: sum over b of (W_ab + I)^H G_ab.

    G is the gradient of the slab, and W has the same outputs.
    """
    grad_tiles = square_tiles(grad_slab, r)
    tiles = square_tiles(weight.contiguous(), r)
    sum_of_tiles = grad_tiles.view(tiles.shape[0], r, -1, r).sum(2)
    return torch.baddbmm(sum_of_tiles, tiles.mH, grad_tiles)


def _cut_into_slabs(weight: Tensor, block: Tensor) -> list[tuple[slice, slice]]:
    """Return slabs (blocks D_a, outputs of W) of SLAB_BYTES each, which fit the cache."""
    blocks, r = block.shape[:2]
    bytes_of_block = r * weight.shape[1] * weight.element_size()
    blocks_of_slab = max(1, SLAB_BYTES // bytes_of_block)
    slabs = []
    for first in range(0, blocks, blocks_of_slab):
        stop = first + blocks_of_slab  # may lie beyond the end, where a slice takes what there is
        slabs.append((slice(first, stop), slice(first * r, stop * r)))
    return slabs


def _new_scratch(weight: Tensor, block: Tensor, slabs: Sequence[tuple[slice, slice]]) -> Tensor:
    """Return memory for one slab, which all slabs share.

    New memory for each of them took a tenth of a step's time.
    """
    blocks = block[slabs[0][0]]
    return weight.new_empty(blocks.numel() * shard_count(weight.shape[1], blocks.shape[1]))


def _use_start(scratch: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """Return the start of the shared memory as a tensor of this shape."""
    return None if scratch is None else scratch[: prod(shape)].view(shape)


def _form_slab(
    weight: Tensor, block: Tensor, scratch: Tensor | None, with_base: bool, add_block: bool
) -> Tensor:
    """Return a slab of W_eff: W_ab + W_ab D_a + D_a.

    Without `with_base`, the first term is left out; without `add_block`, the last.
    """
    base_scale = float(with_base)
    count, r, _ = block.shape
    tiles = square_tiles(weight.contiguous(), r)
    if add_block:
        split_tiles = tiles.view(count, r, -1, r)
        out = _use_start(scratch, split_tiles.shape)
        start = torch.add(block.unsqueeze(2), split_tiles, alpha=base_scale, out=out)
        product = start.view(tiles.shape).baddbmm_(tiles, block)  # into the memory of `start`
    else:
        out = _use_start(scratch, tiles.shape)
        product = torch.baddbmm(tiles, tiles, block, beta=base_scale, out=out)
    # The result has the strides of W, so BLAS picks the same kernel. Then a block of zeros changes
    # no bit of the layer's output.
    effective = product.view(count * r, -1)[: weight.shape[0], : weight.shape[1]]
    return effective.contiguous() if weight.is_contiguous() else effective.mT.contiguous().mT


def _form_traced(weight: Tensor, block: Tensor) -> Tensor:
    """Return W_eff for compiled code, which adds in at least float32, in a single loop.

    `computed_weight` multiplies in float32. With its weight, a step in bfloat16 takes 1.3 (512
    features, 256 tokens) to 2.5 times as long (1,024 features, 64 tokens); in float32, as long.
    """
    _, r, _ = block.shape
    tiles = square_tiles(weight, r)
    dtype = merge_dtype(weight.dtype)
    start = torch.unflatten(tiles, -2, (r, -1))
    product = torch.unflatten(tiles @ block, -2, (r, -1))
    total = start + (product.to(dtype) + block.unsqueeze(-2))
    effective = total.to(weight.dtype).flatten(-4, -3).flatten(-2)
    return effective[: weight.shape[0], : weight.shape[1]]


def bat_streamed(x: Tensor, weight: Tensor, block: Tensor) -> Tensor:
    """Return W_eff x for few tokens, without forming W_eff.

    y_a = sum over b of W_ab (I + D_a) x_b + D_a S(x). This reads W once, in order.
    """
    count, r, _ = block.shape
    x = pad_to_multiple(x, r, dim=-1)
    tokens, in_features = x.shape
    shards = x.reshape(1, -1, r).expand(count, -1, -1)
    inputs = torch.baddbmm(shards, shards, block.mT)  # x_b + D_a x_b for all a at once
    inputs = inputs.view(count, tokens, in_features)
    # The products with the r outputs of each block: (out / r, tokens, r)
    matrices = square_tiles(weight.contiguous(), r).view(count, r, in_features)
    output = torch.bmm(inputs, matrices.mT)
    output = output.transpose(0, 1).reshape(tokens, count * r)
    sums, overflow_scale = overflow_safe_shard_sum(x, r)
    output = output + scaled(sums @ block.reshape(count * r, r).mT, overflow_scale)
    return output[:, : weight.shape[0]]
