"""Bone and tile: all shards of the inputs share one block D, so that dW x = S(x) D.

- Bone, block D (r, out): dW[o, i] = D[i mod r, o];
- tile, block D (r, r_out) where r_out divides out: dW[o, i] = D[i mod r, o mod r_out].

For the backward pass, autograd saves S(x) (tokens x r) and never x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor

from disha.functional.shard_sums import Scale, overflow_safe_shard_sum, scaled, shard_count, tiled


def bone_delta(x: Tensor, block: Tensor, out_features: int, scale: Scale = 1.0) -> Tensor:
    """Return what a Bone (or tile) block adds to the layer's output: s * S(x) D, tiled.

    Args:
        x: input (..., in).
        block: D, (r, out_features) for Bone or (r, r_out) for a tile. Axes in front are batches,
            as in `torch.matmul`.
        out_features: size of the layer's output; a multiple of the block's second size.
        scale: runtime scale s, a number or a 0-dim tensor.

    Returns:
        Tensor (..., out_features), in the dtype of x, or autocast's.

    Raises:
        ArgumentError: the block's second size does not divide out_features.

    Source: arXiv 2409.15371, section 3.

    Examples:
        >>> import torch
        >>> from disha.functional import bone_delta
        >>> bone_delta(torch.ones(1, 6), torch.ones(2, 3), out_features=3)
        tensor([[6., 6., 6.]])
    """
    sums, overflow_scale = overflow_safe_shard_sum(x, block.shape[-2])
    matrix = scaled(tiled(block, out_features), scale).to(x.dtype)
    return scaled(sums @ matrix, overflow_scale)


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
    tiles = tiled(block, out_features).mT
    shards = shard_count(in_features, block.shape[-2])
    return tiles.repeat(*(1,) * (block.dim() - 1), shards)[..., :in_features]


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
    lora_b = tiled(block, out_features).mT
    return lora_a.contiguous(), lora_b.contiguous()


def embedding_delta(
    indices: Tensor, block: Tensor, dim: int, scale: Scale = 1.0, padding_idx: int | None = None
) -> Tensor:
    """Return what a Bone (or tile) block adds to an embedding's output: s * D[i mod r].

    The shard sum of a one-hot input is one-hot at (index mod r). So y = W[i] + s * D[i mod r].

    Args:
        indices: integer tensor (...) of row numbers, none negative.
        block: D, (r, dim) for Bone or (r, r_out) for a tile.
        dim: size of an embedding; a multiple of the block's second size.
        scale: runtime scale s, a number or a 0-dim tensor.
        padding_idx: row that gets no update.

    Returns:
        Tensor (..., dim), in the block's dtype.

    Raises:
        ArgumentError: the block's second size does not divide dim.

    Source: arXiv 2409.15371 for a one-hot input.

    Examples:
        >>> import torch
        >>> from disha.functional import embedding_delta
        >>> embedding_delta(torch.tensor([0, 3, 2]), torch.tensor([[1.0], [2.0]]), dim=1).flatten()
        tensor([1., 2., 1.])
    """
    delta = F.embedding(indices % block.shape[0], tiled(block, dim))
    if padding_idx is not None:
        delta = delta.masked_fill((indices == padding_idx).unsqueeze(-1), 0.0)
    return scaled(delta, scale)


def routed_delta(x: Tensor, blocks: Sequence[Tensor], choices: Tensor) -> Tensor:
    """Return what Bone blocks add if each sample has its own block, computed in one product.

    Sample i has the block `blocks[choices[i]]`, or none if that index is the number of blocks.
    """
    samples = choices.shape[0]
    r, out_features = blocks[0].shape
    no_block = torch.zeros_like(blocks[0])
    table = torch.stack([*blocks, no_block])
    tokens = x.shape[:-1].numel() // samples  # of one sample
    sums, overflow_scale = overflow_safe_shard_sum(x, r)
    product = sums.reshape(samples, tokens, r) @ table.to(x.dtype)[choices]
    return scaled(product, overflow_scale).reshape(*x.shape[:-1], out_features)
