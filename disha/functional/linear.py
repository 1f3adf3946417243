"""Bone, tile and BAT for linear layers: y = W x + b with W (out, in).

- Bone, block D (r, out): dW[o, i] = D[i mod r, o], so that dW x = S(x) D;
- tile, block D (r, r_out) where r_out divides out: dW[o, i] = D[i mod r, o mod r_out];
- BAT, block D (ceil(out / r), r, r): with W cut into r x r tiles W_ab (output block a, input
  block b), dW_ab = W_ab D_a + D_a.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from disha.errors import ArgumentError
from disha.functional import fused
from disha.functional.fused import autocasts, bat_linear, bone_linear, fusible, streams
from disha.functional.products import LARGE_WEIGHT, base_product
from disha.functional.shards import (
    Scale,
    merge_dtype,
    merged_weight,
    pad_to_multiple,
    repeat_tile,
    shard_count,
    shard_sum,
    square_tiles,
    tile_count,
    without_autocast,
)

__all__ = [
    "adapted_linear",
    "bat_delta_weight",
    "bat_forward",
    "bat_unmerge",
    "bone_delta",
    "bone_delta_weight",
    "bone_forward",
    "bone_lora_factors",
    "bone_unmerge",
    "plain_linear",
    "routed_bat_delta",
    "routed_bone_delta",
]


def bone_delta(x: Tensor, block: Tensor, out_features: int, scale: Scale = 1.0) -> Tensor:
    """Return what a Bone (or tile) block adds to the layer's output: s * S(x) D, tiled.

    Args:
        x: input (..., in).
        block: D, (r, out_features) for Bone or (r, r_out) for a tile.
        out_features: size of the layer's output; a multiple of the block's second size.
        scale: runtime scale s, a number or a 0-dim tensor.

    Returns:
        Tensor (..., out_features), in the block's dtype (autocast aside).

    Raises:
        ArgumentError: the block's second size does not divide out_features.

    Source: arXiv 2409.15371, section 3.

    Examples:
        >>> import torch
        >>> from disha.functional import bone_delta
        >>> bone_delta(torch.ones(1, 6), torch.ones(2, 3), out_features=3)
        tensor([[6., 6., 6.]])
    """
    tiles = tile_count(block, out_features)
    sums = shard_sum(x, block.shape[0], dtype=block.dtype)
    if isinstance(scale, Tensor) or scale != 1.0:
        sums = sums * scale  # (..., r): cheaper than scaling D or the output
    return repeat_tile(sums @ block, tiles)


def bone_delta_weight(block: Tensor, in_features: int, out_features: int) -> Tensor:
    """Return dW of a Bone (or tile) block: dW[o, i] = D[i mod r, o mod r_out].

    Args:
        block: D, (r, out_features) or (r, r_out).
        in_features: columns of the weight.
        out_features: rows of the weight.

    Returns:
        Tensor (out_features, in_features).

    Raises:
        ArgumentError: the block's second size does not divide out_features.

    Source: arXiv 2409.15371, section 3.

    Examples:
        >>> import torch
        >>> from disha.functional import bone_delta_weight
        >>> bone_delta_weight(torch.tensor([[1.0], [2.0]]), in_features=5, out_features=1)
        tensor([[1., 2., 1., 2., 1.]])
    """
    shards, tiles = shard_count(in_features, block.shape[0]), tile_count(block, out_features)
    delta = repeat(block, "r r_out -> (tiles r_out) (shards r)", tiles=tiles, shards=shards)
    return delta[:, :in_features]


def bone_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor, scale: Scale = 1.0
) -> Tensor:
    """Return y = W x + b + s * S(x) D: a linear layer with one Bone (or tile) block.

    Args:
        x: input (..., in).
        weight: W (out, in).
        bias: b (out,), or None.
        block: D (r, out) or (r, r_out).
        scale: runtime scale s.

    Returns:
        Tensor (..., out), in the dtype that the plain linear layer returns.

    Source: arXiv 2409.15371, section 3.

    Examples:
        >>> import torch
        >>> from disha.functional import bone_forward
        >>> bone_forward(torch.ones(4), torch.zeros(3, 4), None, torch.ones(2, 3), scale=0.5)
        tensor([2., 2., 2.])
    """
    y = F.linear(x, weight, bias)
    return y + bone_delta(x, block, weight.shape[0], scale).to(y.dtype)


def bone_unmerge(merged: Tensor, block: Tensor, scale: float = 1.0) -> Tensor:
    """Return W = W' - s * dW, undoing a Bone (or tile) merge up to rounding.

    `disha.unmerge_adapters` does not use this: it keeps the original and is exact. This is for
    weights that come merged from elsewhere.

    Args:
        merged: W' (out, in).
        block: D (r, out) or (r, r_out).
        scale: the scale that was merged.

    Returns:
        Tensor (out, in), of merged's dtype.

    Source: arXiv 2409.15371, section 3.

    Examples:
        >>> import torch
        >>> from disha.functional import bone_unmerge
        >>> bone_unmerge(torch.ones(3, 4), torch.ones(2, 3))
        tensor([[0., 0., 0., 0.],
                [0., 0., 0., 0.],
                [0., 0., 0., 0.]])
    """
    out_features, in_features = merged.shape
    delta = bone_delta_weight(block, in_features, out_features)
    return merged_weight(merged, [(delta, -scale)])


def bone_lora_factors(block: Tensor, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
    """Return the LoRA factors A, B of a Bone (or tile) block: dW = B A, without loss.

    A = [I_r I_r ... I_r] cropped to (r, in), B = D^T (for a tile D^T repeated along the output):
    Bone is exactly a LoRA of rank r with alpha = r.

    Args:
        block: D (r, out) or (r, r_out).
        in_features: columns of the weight.
        out_features: rows of the weight.

    Returns:
        A (r, in_features) and B (out_features, r), contiguous, of the block's dtype.

    Source: arXiv 2409.15371, section 3; Hu et al., "LoRA", arXiv 2106.09685.

    Examples:
        >>> import torch
        >>> from disha.functional import bone_lora_factors
        >>> A, B = bone_lora_factors(torch.tensor([[3.0], [4.0]]), in_features=5, out_features=1)
        >>> B @ A
        tensor([[3., 4., 3., 4., 3.]])
    """
    r = block.shape[0]
    identity = torch.eye(r, dtype=block.dtype, device=block.device)
    shards = shard_count(in_features, r)
    lora_a = repeat(identity, "r j -> r (shards j)", shards=shards)[:, :in_features]
    lora_b = repeat_tile(block, tile_count(block, out_features)).T
    return lora_a.contiguous(), lora_b.contiguous()


def bat_delta_weight(weight: Tensor, block: Tensor) -> Tensor:
    """Return dW of a BAT block: dW_ab = W_ab D_a + D_a for every r x r tile of W.

    Args:
        weight: W (out, in), the original.
        block: D (ceil(out / r), r, r).

    Returns:
        Tensor (out, in), in float32 or, if W or D is wider, in float64: rounding dW to 16 bits
        and then W + dW again would round twice. Autocast is off here for the same reason.

    Raises:
        ArgumentError: the block is not one for that many rows.

    Source: arXiv 2409.15371, section 3.3.

    Examples:
        >>> import torch
        >>> from disha.functional import bat_delta_weight
        >>> bat_delta_weight(torch.eye(2), 3.0 * torch.eye(2)[None])
        tensor([[6., 0.],
                [0., 6.]])
    """
    out_features, in_features = weight.shape
    r = block.shape[-1]
    if tuple(block.shape) != (shard_count(out_features, r), r, r):
        raise ArgumentError(
            f"a BAT block for {out_features} rows and r={r} has shape "
            f"({shard_count(out_features, r)}, {r}, {r}), got {tuple(block.shape)}"
        )
    dtype = merge_dtype(torch.promote_types(weight.dtype, block.dtype))
    weight, block = weight.to(dtype), block.to(dtype)
    with without_autocast(weight.device):
        product = rearrange(torch.bmm(square_tiles(weight, r), block), "a (i b) j -> a i b j", i=r)
    delta = product + rearrange(block, "a i j -> a i 1 j")
    return rearrange(delta, "a i b j -> (a i) (b j)")[:out_features, :in_features]


def bat_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor, scale: Scale = 1.0
) -> Tensor:
    """Return y = (W + s * dW) x + b: a linear layer with one BAT block.

    Args:
        x: input (..., in).
        weight: W (out, in).
        bias: b (out,), or None.
        block: D (ceil(out / r), r, r).
        scale: runtime scale s.

    Returns:
        Tensor (..., out), in the dtype that the plain linear layer returns.

    Source: arXiv 2409.15371, section 3.3.

    Examples:
        >>> import torch
        >>> from disha.functional import bat_forward
        >>> bat_forward(torch.ones(2), torch.eye(2), None, torch.eye(2)[None])
        tensor([3., 3.])
    """
    return F.linear(x, merged_weight(weight, [(bat_delta_weight(weight, block), scale)]), bias)


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bones: Sequence[tuple[Tensor, Scale]] = (),
    bats: Sequence[tuple[Tensor, Scale]] = (),
) -> Tensor:
    """Return (W + sum of s dW over BAT blocks) x + b + sum of s S(x) D over Bone blocks.

    Each dW comes from the original W. Chooses the cheapest of the ways in which this library
    computes that: see `disha.functional.fused` for what is not plain autograd.

    Args:
        x: input (..., in).
        weight: W (out, in), dense if there are BAT blocks.
        bias: b (out,), or None.
        bones: Bone and tile blocks with their scales.
        bats: BAT blocks with their scales.

    Returns:
        Tensor (..., out), in the dtype that the plain linear layer returns.

    Source: arXiv 2409.15371, section 3.

    Examples:
        >>> import torch
        >>> from disha.functional import adapted_linear
        >>> bone, bat = torch.ones(1, 2), torch.eye(2)[None]
        >>> adapted_linear(torch.ones(2), torch.eye(2), None, [(bone, 1.0)], [(bat, 0.5)])
        tensor([4., 4.])
    """
    if bats:
        # S(x) of Bone blocks comes after: their plain products are added to what BAT gives.
        output = _with_bats(x, weight, bias, bats)
    elif bones and (operands := _fused(x, weight, bias, *bones[0])) is not None:
        tile_count(bones[0][0], weight.shape[0])
        output = bone_linear(*operands)
        if len(bones) == 1:
            return output
        bones = bones[1:]
    else:
        # S(x) before W x: backward then adds dS into a gradient of x that is there already.
        deltas = [bone_delta(x, block, weight.shape[0], scale) for block, scale in bones]
        return _added(F.linear(x, weight, bias), deltas)
    return _added(output, [bone_delta(x, block, weight.shape[0], s) for block, s in bones])


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return W x + b, which no block changes, in less time than `F.linear` where that can be.

    Args:
        x: input (..., in).
        weight: W (out, in).
        bias: b (out,), or None.

    Returns:
        Tensor (..., out), what `F.linear` returns.

    Examples:
        >>> import torch
        >>> from disha.functional import plain_linear
        >>> plain_linear(torch.ones(2), torch.eye(2), torch.ones(2))
        tensor([2., 2.])
    """
    if torch.is_grad_enabled() or torch._C._is_tracing() or weight.numel() < LARGE_WEIGHT:
        return F.linear(x, weight, bias)
    operands = (x, weight) if bias is None else (x, weight, bias)
    strided = all(one.layout is torch.strided and not one.is_nested for one in operands)
    if not strided or not fusible(*operands) or autocasts(x.device):
        return F.linear(x, weight, bias)
    return base_product(x, weight, bias)


def routed_bone_delta(
    x: Tensor, blocks: Sequence[Tensor], scales: Sequence[Scale], choices: Tensor
) -> Tensor:
    """Return what Bone blocks add where each sample has a block of its own, in one product.

    Args:
        x: input (samples * n, ..., in): each sample covers n entries of the leading dimension.
        blocks: D of each adapter, all (r, out), of one dtype.
        scales: runtime scale of each.
        choices: (samples,), the index of each sample's block, or len(blocks) for none.

    Returns:
        Tensor (samples * n, ..., out), in the blocks' dtype.

    Source: arXiv 2409.15371, section 3.

    Examples:
        >>> import torch
        >>> from disha.functional import routed_bone_delta
        >>> blocks = [torch.ones(1, 2), torch.full((1, 2), 2.0)]
        >>> routed_bone_delta(torch.ones(3, 2), blocks, [1.0, 1.0], torch.tensor([1, 2, 0]))
        tensor([[4., 4.],
                [0., 0.],
                [2., 2.]])
    """
    samples, (r, out_features) = choices.shape[0], blocks[0].shape
    table = _table(blocks, scales)
    each = x.shape[:-1].numel() // samples
    sums = shard_sum(x, r, dtype=table.dtype).reshape(samples, each, r)
    return (sums @ table[choices]).reshape(*x.shape[:-1], out_features)


def routed_bat_delta(
    x: Tensor,
    weight: Tensor,
    blocks: Sequence[Tensor],
    scales: Sequence[Scale],
    choices: Tensor,
) -> Tensor | None:
    """Return what BAT blocks add where each sample has a block of its own, W being read once.

    Args:
        x: input (samples * n, ..., in): each sample covers n entries of the leading dimension.
        weight: W (out, in), dense.
        blocks: D of each adapter, all (ceil(out / r), r, r), of one dtype.
        scales: runtime scale of each.
        choices: (samples,), the index of each sample's block, or len(blocks) for none.

    Returns:
        Tensor (samples * n, ..., out), or None where a product per adapter is as good: for many
        tokens, and where gradients are recorded.

    Source: arXiv 2409.15371, section 3.3.

    Examples:
        >>> import torch
        >>> from disha.functional import routed_bat_delta
        >>> blocks, choices = [torch.eye(4)[None]], torch.tensor([0, 1])
        >>> with torch.no_grad():
        ...     routed_bat_delta(torch.ones(2, 4), torch.eye(4), blocks, [1.0], choices)
        tensor([[2., 2., 2., 2.],
                [0., 0., 0., 0.]])
    """
    tokens, r = x.shape[:-1].numel(), blocks[0].shape[-1]
    if torch.is_grad_enabled() or not streams(tokens, r):
        return None
    operands = _fused(x, weight, None, _table(blocks, scales), 1.0)
    if operands is None:
        return None
    x, weight, _, table, _ = operands
    return fused.routed_bat_delta(x, weight, table[choices])


def _table(blocks: Sequence[Tensor], scales: Sequence[Scale]) -> Tensor:
    """Return s * D of every adapter, and zeros for samples without one."""
    scaled = [_scaled(block, scale) for block, scale in zip(blocks, scales, strict=True)]
    return torch.stack([*scaled, torch.zeros_like(blocks[0])])


def _added(output: Tensor, deltas: Sequence[Tensor]) -> Tensor:
    for delta in deltas:
        output = output + delta.to(output.dtype)
    return output


def _scaled(block: Tensor, scale: Scale) -> Tensor:
    return block if isinstance(scale, float) and scale == 1.0 else block * scale


def _with_bats(
    x: Tensor, weight: Tensor, bias: Tensor | None, bats: Sequence[tuple[Tensor, Scale]]
) -> Tensor:
    if len({block.shape for block, _ in bats}) == 1:
        # dW is linear in D: the blocks add up before they meet W.
        first, *others = (_scaled(block, scale) for block, scale in bats)
        total = sum(others, first)
        # In 16 bits W_eff is rounded anyway: a wider D is of no use in the product.
        narrow = total.to(weight.dtype) if total.dtype == torch.float32 else total
        operands = _fused(x, weight, bias, narrow, 1.0)
        if operands is not None:
            return bat_linear(*operands[:4])
    deltas = [(bat_delta_weight(weight, block), scale) for block, scale in bats]
    return F.linear(x, merged_weight(weight, deltas), bias)


def _fused(
    x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor, scale: Scale
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, float] | None:
    """Return the operands in the one dtype of a fused product, or None where it does not apply."""
    if isinstance(scale, Tensor) or not fusible(x, weight, block):
        return None
    dtype, device = x.dtype, x.device
    if autocasts(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
        x, weight, block = x.to(dtype), weight.to(dtype), block.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    same = weight.dtype == block.dtype == dtype and (bias is None or bias.dtype == dtype)
    return (x, weight, bias, block, scale) if same else None


def bat_unmerge(merged: Tensor, block: Tensor, scale: float = 1.0) -> Tensor:
    """Return W from W' = W + s (W D + D), tile by tile: W = (W' - s D)(I + s D)^-1.

    Lossy where I + s D is near singular. `disha.unmerge_adapters` does not use this: it keeps
    the original and is exact. This is for weights that come merged from elsewhere.

    Args:
        merged: W' (out, in).
        block: D (ceil(out / r), r, r).
        scale: the scale that was merged.

    Returns:
        Tensor (out, in), of merged's dtype; computed in float32 (float64 for float64).

    Raises:
        ArgumentError: I + s D is singular for some block, so that W is lost.

    Source: arXiv 2409.15371, section 3.3.

    Examples:
        >>> import torch
        >>> from disha.functional import bat_unmerge
        >>> bat_unmerge(torch.tensor([[3.0, 1.0], [1.0, 3.0]]), torch.eye(2)[None])
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]])
    """
    out_features, in_features = merged.shape
    r = block.shape[-1]
    dtype = merge_dtype(merged.dtype)
    # A ragged last row block is zero-padded in W, not in W': the padding's rows of W' are s D's,
    # and so are cropped away again. A ragged last column shard is cropped in W' and lost to the
    # inverse, so it is solved for on its own below.
    update = block.to(dtype) * scale
    affine = torch.eye(r, dtype=dtype, device=merged.device) + update
    padded = pad_to_multiple(merged.to(dtype), r, dim=-2)
    whole = in_features - in_features % r
    parts = []
    for columns, width in ((padded[:, :whole], r), (padded[:, whole:], in_features % r)):
        if not width or not columns.shape[1]:
            continue
        tiles = rearrange(columns, "(a i) (b k) -> a i b k", i=r, k=width)
        shifted = tiles - rearrange(update[:, :, :width], "a i k -> a i 1 k")
        right = rearrange(shifted, "a i b k -> a (i b) k")
        solved, info = torch.linalg.solve_ex(affine[:, :width, :width], right, left=False)
        if info.any():
            raise ArgumentError(
                "bat_unmerge: I + scale * D is singular for at least one output block, so the "
                "original weight can't be recovered from the merged one; load the original instead"
            )
        parts.append(rearrange(solved, "a (i b) k -> (a i) (b k)", i=r))
    return torch.cat(parts, dim=1)[:out_features].to(merged.dtype)
