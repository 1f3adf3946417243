"""Bone, tile and BAT for one matrix W (out, in), or for stacks of them: y = W x + b.

- Bone, block D (r, out): dW[o, i] = D[i mod r, o], so that dW x = S(x) D;
- tile, block D (r, r_out) where r_out divides out: dW[o, i] = D[i mod r, o mod r_out];
- BAT, block D (ceil(out / r), r, r): with W cut into r x r tiles W_ab (output block a, input
  block b), dW_ab = W_ab D_a + D_a.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor

from disha.errors import ArgumentError
from disha.functional.fused import bat_linear
from disha.functional.shards import (
    Scale,
    merge_dtype,
    merged_weight,
    pad_to_multiple,
    repeat_tile,
    scaled,
    scaled_sums,
    shard_count,
    square_tiles,
    tile_count,
    without_autocast,
)

__all__ = [
    "bat_delta_weight",
    "bat_forward",
    "bat_stack",
    "bone_delta",
    "bone_delta_weight",
    "bone_forward",
    "bone_lora_factors",
    "routed_bone_delta",
]


def bone_delta(
    x: Tensor,
    block: Tensor,
    out_features: int,
    scale: Scale = 1.0,
    multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> Tensor:
    """Return what a Bone (or tile) block adds to the layer's output: s * S(x) D, tiled.

    Args:
        x: input (..., in).
        block: D, (r, out_features) for Bone or (r, r_out) for a tile; stacks multiply as in
            `torch.matmul`.
        out_features: size of the layer's output; a multiple of the block's second size.
        scale: runtime scale s, a number or a 0-dim tensor.
        multiply: the product of S(x) and D.

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
    sums, regain = scaled_sums(x, block.shape[-2], block.dtype, scale)
    return repeat_tile(scaled(multiply(sums, block), regain), tiles)


def bone_delta_weight(block: Tensor, in_features: int, out_features: int) -> Tensor:
    """Return dW of a Bone (or tile) block: dW[o, i] = D[i mod r, o mod r_out].

    Args:
        block: D, (..., r, out_features) or (..., r, r_out).
        in_features: columns of the weight.
        out_features: rows of the weight.

    Returns:
        Tensor (..., out_features, in_features).

    Raises:
        ArgumentError: the block's second size does not divide out_features.

    Source: arXiv 2409.15371, section 3.

    Examples:
        >>> import torch
        >>> from disha.functional import bone_delta_weight
        >>> bone_delta_weight(torch.tensor([[1.0], [2.0]]), in_features=5, out_features=1)
        tensor([[1., 2., 1., 2., 1.]])
    """
    shards, tiles = shard_count(in_features, block.shape[-2]), tile_count(block, out_features)
    # repeat(block, "... r r_out -> ... (tiles r_out) (shards r)"), natively: see repeat_tile
    delta = block.mT.repeat(*(1,) * (block.dim() - 2), tiles, shards)
    return delta[..., :in_features]


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


def bone_lora_factors(block: Tensor, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
    """Return the LoRA factors A, B of a Bone (or tile) block: dW = B A, without loss.

    A = [I_r I_r ... I_r] cropped to (r, in), B = D^T (for a tile D^T repeated along the output):
    Bone is exactly a LoRA of rank r with alpha = r.

    Args:
        block: D (..., r, out) or (..., r, r_out).
        in_features: columns of the weight.
        out_features: rows of the weight.

    Returns:
        A (..., r, in_features) and B (..., out_features, r), contiguous, of the block's dtype.

    Source: arXiv 2409.15371, section 3; Hu et al., "LoRA", arXiv 2106.09685.

    Examples:
        >>> import torch
        >>> from disha.functional import bone_lora_factors
        >>> A, B = bone_lora_factors(torch.tensor([[3.0], [4.0]]), in_features=5, out_features=1)
        >>> B @ A
        tensor([[3., 4., 3., 4., 3.]])
    """
    r = block.shape[-2]
    identity = torch.eye(r, dtype=block.dtype, device=block.device)
    shards = shard_count(in_features, r)
    lora_a = repeat(identity, "r j -> r (shards j)", shards=shards)[:, :in_features]
    lora_a = lora_a.expand(*block.shape[:-2], r, in_features)
    lora_b = repeat_tile(block, tile_count(block, out_features)).mT
    return lora_a.contiguous(), lora_b.contiguous()


def bat_delta_weight(weight: Tensor, block: Tensor) -> Tensor:
    """Return dW of a BAT block: dW_ab = W_ab D_a + D_a for every r x r tile of W.

    Args:
        weight: W (..., out, in), the original.
        block: D (..., ceil(out / r), r, r).

    Returns:
        Tensor (..., out, in), in float32 or, if W or D is wider, in float64: rounding dW to 16 bits
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
    *stack, out_features, in_features = weight.shape
    r = block.shape[-1]
    expected = (*stack, shard_count(out_features, r), r, r)
    if tuple(block.shape) != expected:
        raise ArgumentError(
            f"a BAT block for a weight of shape {tuple(weight.shape)} and r={r} has shape "
            f"{expected}, got {tuple(block.shape)}"
        )
    dtype = merge_dtype(torch.promote_types(weight.dtype, block.dtype))
    tiles, block = square_tiles(weight.to(dtype), r), block.to(dtype)
    with without_autocast(weight.device):
        product = torch.unflatten(tiles @ block, -2, (r, -1))  # (..., a, i, b, j)
    delta = (product + block.unsqueeze(-2)).flatten(-4, -3).flatten(-2)  # (..., a i, b j)
    return delta[..., :out_features, :in_features]


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


def bat_stack(x: Tensor, weight: Tensor, block: Tensor, scale: Scale = 1.0) -> Tensor:
    """Return x (W + s dW)^T for a stack of matrices with a BAT block each.

    W_eff is formed for one matrix at a time. For a single input of each matrix it is not formed at
    all: y_a = sum over b of W_ab (x_b + s D_a x_b) + s D_a S(x).

    Args:
        x: input (experts, n, in).
        weight: W (experts, out, in).
        block: D (experts, ceil(out / r), r, r).
        scale: runtime scale s.

    Returns:
        Tensor (experts, n, out), in the dtype that the plain product returns.

    Source: arXiv 2409.15371, section 3.3.

    Examples:
        >>> import torch
        >>> from disha.functional import bat_stack
        >>> W, D = torch.eye(2).expand(3, 2, 2), torch.eye(2).expand(3, 1, 2, 2)
        >>> bat_stack(torch.ones(3, 1, 2), W, D)[0]
        tensor([[3., 3.]])
    """
    block = scaled(block, scale)
    if x.shape[-2] != 1:
        each = zip(x.unbind(0), weight.unbind(0), block.unbind(0), strict=True)
        return torch.stack([_bat_matrix(*one) for one in each])
    experts, out_features, _ = weight.shape
    count, r = block.shape[1], block.shape[-1]
    weight, block = weight.to(x.dtype), block.to(x.dtype)
    shards = pad_to_multiple(x, r, dim=-1).reshape(experts, 1, -1, r)
    moved = (shards + shards @ block.mT).flatten(2).unsqueeze(-1)  # (experts, count, in, 1)
    tiles = pad_to_multiple(pad_to_multiple(weight, r, dim=-1), r, dim=-2)
    output = tiles.reshape(experts, count, r, -1) @ moved
    sums, regain = scaled_sums(x, r, x.dtype)
    direct = block @ sums.unsqueeze(-1) * regain  # (experts, count, r, 1)
    return (output + direct).reshape(experts, 1, -1)[..., :out_features]


def _bat_matrix(x: Tensor, weight: Tensor, block: Tensor) -> Tensor:
    fused = bat_linear(x, weight, None, block)
    return bat_forward(x, weight, None, block) if fused is None else fused


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
    sums, regain = scaled_sums(x, r, table.dtype)
    product = sums.reshape(samples, each, r) @ table[choices]
    return scaled(product, regain).reshape(*x.shape[:-1], out_features)


def _table(blocks: Sequence[Tensor], scales: Sequence[Scale]) -> Tensor:
    """Return s * D of every adapter, and zeros for samples without one."""
    rows = [scaled(block, scale) for block, scale in zip(blocks, scales, strict=True)]
    return torch.stack([*rows, torch.zeros_like(blocks[0])])
