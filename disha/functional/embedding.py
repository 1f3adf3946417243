"""Bone for embeddings: the shards are runs of r rows.

A one-hot input's shard sum is one-hot at (index mod r), so for a weight W (rows, dim) and a block
D (r, dim), or a tile (r, r_out):

    dW[i, d] = D[i mod r, d mod r_out]          y = W[i] + s * D[i mod r]
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from disha.functional.shards import Scale, repeat_tile, scaled, tile_count

__all__ = ["embedding_delta"]


def embedding_delta(
    indices: Tensor, block: Tensor, dim: int, scale: Scale = 1.0, padding_idx: int | None = None
) -> Tensor:
    """Return what a Bone (or tile) block adds to an embedding's output: s * D[i mod r].

    Args:
        indices: integer tensor (...) of row numbers, none negative.
        block: D, (r, dim) for Bone or (r, r_out) for a tile.
        dim: size of an embedding; a multiple of the block's second size.
        scale: runtime scale s, a number or a 0-dim tensor.
        padding_idx: row that stays untouched.

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
    tiles = tile_count(block, dim)
    delta = repeat_tile(F.embedding(indices % block.shape[0], block), tiles)
    if padding_idx is not None:
        delta = delta.masked_fill((indices == padding_idx).unsqueeze(-1), 0.0)
    return scaled(delta, scale)
