"""Bone for convolutions: the shards are runs of r input channels of each group.

For a weight W (out, in_g, *kernel), in_g = in / groups, and a block D (out, r, *kernel):

    dW[o, i, *k] = D[o, i mod r, *k]          dW convolved with x = D convolved with S(x)

where S sums the shards of every group's channels and so leaves groups * r channels. A transposed
convolution keeps its weight as (in, out_g, *kernel), and its block as (groups * r, out_g, *kernel).
A tile has r_out in place of out (of out_g), and is repeated along it.

Source: arXiv 2409.15371, applied at every position of the kernel.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor

from disha.errors import ArgumentError
from disha.functional.shards import pad_to_multiple, shard_count

__all__ = [
    "channel_shard_sum",
    "conv_delta_weight",
    "conv_transpose_delta_weight",
    "whole_block",
]


def channel_shard_sum(
    x: Tensor, r: int, groups: int, spatial: int, dtype: torch.dtype | None = None
) -> Tensor:
    """Sum the shards of every group's channels.

    Args:
        x: tensor (..., groups * in_g, *positions) with `spatial` position dimensions.
        r: shard size, at least 1.
        groups: number of groups.
        spatial: number of position dimensions: 1, 2 or 3.
        dtype: dtype to accumulate in and return; x's own by default.

    Returns:
        Tensor (..., groups * r, *positions).

    Examples:
        >>> import torch
        >>> from disha.functional import channel_shard_sum
        >>> x = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]])
        >>> channel_shard_sum(x, r=2, groups=1, spatial=1).flatten()
        tensor([9., 6.])
    """
    leading, channels = x.shape[: -spatial - 1], x.shape[-spatial - 1]
    positions = x.shape[-spatial:]
    grouped = x.reshape(*leading, groups, channels // groups, *positions)
    padded = pad_to_multiple(grouped, r, dim=-spatial - 1)
    # reduce(padded, "... g (n r) positions -> ... g r positions", "sum"), natively: the hot path
    shards = padded.reshape(*leading, groups, padded.shape[-spatial - 1] // r, r, *positions)
    sums = torch.sum(shards, dim=-spatial - 2, dtype=dtype)
    return sums.reshape(*leading, groups * r, *positions)


def whole_block(block: Tensor, out_features: int, dim: int) -> Tensor:
    """Repeat a tile along its output dimension `dim` until it is out_features long.

    Args:
        block: D of a convolution.
        out_features: size to reach; a multiple of the block's.
        dim: 0 for a convolution, 1 for a transposed one.

    Returns:
        The block itself if it is long enough.

    Raises:
        ArgumentError: the block's size does not divide out_features.

    Source: arXiv 2409.15371; a tile is upstream's "mini".

    Examples:
        >>> import torch
        >>> from disha.functional import whole_block
        >>> whole_block(torch.zeros(2, 3, 5), out_features=6, dim=0).shape
        torch.Size([6, 3, 5])
    """
    r_out = block.shape[dim]
    if out_features % r_out:
        raise ArgumentError(
            f"a block of shape {tuple(block.shape)} does not fit an output of {out_features}: "
            f"{r_out} must divide it"
        )
    if r_out == out_features:
        return block
    tiles = out_features // r_out
    if dim == 0:
        return repeat(block, "r_out ... -> (tiles r_out) ...", tiles=tiles)
    return repeat(block, "r r_out ... -> r (tiles r_out) ...", tiles=tiles)


def conv_delta_weight(block: Tensor, in_features: int, out_features: int) -> Tensor:
    """Return dW of a convolution's block: dW[o, i, *k] = D[o mod r_out, i mod r, *k].

    Args:
        block: D (out, r, *kernel), or (r_out, r, *kernel) for a tile.
        in_features: input channels per group.
        out_features: output channels.

    Returns:
        Tensor (out_features, in_features, *kernel).

    Raises:
        ArgumentError: the block's first size does not divide out_features.

    Source: arXiv 2409.15371, section 3, at every position of the kernel.

    Examples:
        >>> import torch
        >>> from disha.functional import conv_delta_weight
        >>> conv_delta_weight(torch.zeros(4, 2, 3), in_features=5, out_features=8).shape
        torch.Size([8, 5, 3])
    """
    shards = shard_count(in_features, block.shape[1])
    whole = whole_block(block, out_features, dim=0)
    return repeat(whole, "out r ... -> out (shards r) ...", shards=shards)[:, :in_features]


def conv_transpose_delta_weight(
    block: Tensor, in_features: int, out_features: int, groups: int
) -> Tensor:
    """Return dW of a transposed convolution's block, for each group g of input channels.

    dW[g * in_g + i, o, *k] = D[g * r + i mod r, o mod r_out, *k].

    Args:
        block: D (groups * r, out_g, *kernel), or (groups * r, r_out, *kernel) for a tile.
        in_features: input channels per group, in_g.
        out_features: output channels per group, out_g.
        groups: number of groups.

    Returns:
        Tensor (groups * in_features, out_features, *kernel).

    Raises:
        ArgumentError: the block's second size does not divide out_features.

    Source: arXiv 2409.15371, section 3, at every position of the kernel.

    Examples:
        >>> import torch
        >>> from disha.functional import conv_transpose_delta_weight
        >>> block = torch.zeros(4, 3, 5)
        >>> conv_transpose_delta_weight(block, in_features=7, out_features=6, groups=2).shape
        torch.Size([14, 6, 5])
    """
    shards = shard_count(in_features, block.shape[0] // groups)
    whole = whole_block(block, out_features, dim=1)
    grouped = repeat(whole, "(g r) out ... -> g (shards r) out ...", g=groups, shards=shards)
    return rearrange(grouped[:, :in_features], "g i out ... -> (g i) out ...")
