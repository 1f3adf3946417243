"""What every layer kind shares: cutting dimensions into shards, and adding updates to weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor

from disha.errors import ArgumentError

__all__ = [
    "Scale",
    "added",
    "merge_dtype",
    "merged_weight",
    "pad_to_multiple",
    "repeat_tile",
    "shard_count",
    "shard_sum",
    "square_tiles",
    "tile_count",
    "weighted_sum",
    "widened_block",
    "without_autocast",
]

Scale = float | Tensor


def shard_count(features: int, r: int) -> int:
    """Return ceil(features / r): how many shards of r cover a dimension.

    Args:
        features: size of the dimension.
        r: size of one shard.

    Examples:
        >>> from disha.functional import shard_count
        >>> shard_count(10, 4)
        3
    """
    return -(-features // r)


def pad_to_multiple(x: Tensor, r: int, dim: int) -> Tensor:
    """Zero-pad `dim` (negative) of x at its end to a multiple of r."""
    missing = -x.shape[dim] % r
    if not missing:
        return x
    return F.pad(x, (0, 0) * (-dim - 1) + (0, missing))


def shard_sum(x: Tensor, r: int, dtype: torch.dtype | None = None) -> Tensor:
    """Sum the shards of the last dimension: S(x)[j] = sum over b of x[b r + j].

    Args:
        x: tensor (..., in).
        r: shard size, at least 1.
        dtype: dtype to accumulate in and return; x's own by default.

    Returns:
        Tensor (..., r).

    Source: arXiv 2409.15371, section 3.

    Examples:
        >>> import torch
        >>> from disha.functional import shard_sum
        >>> shard_sum(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), r=2)
        tensor([9., 6.])
    """
    # reduce(x, "... (b r) -> ... r", "sum"), natively: this is the hot path
    if x.shape[-1] % r:
        x = pad_to_multiple(x, r, dim=-1)
    return x.view(*x.shape[:-1], x.shape[-1] // r, r).sum(-2, dtype=dtype)


def square_tiles(weight: Tensor, r: int) -> Tensor:
    """Return W (out, in) as its r x r tiles, those of an output block below each other.

    (out / r, r * in / r, r), zero-padded where r does not divide a size. Row-major (a i) (b k) is
    already "a (i b) k": no permutation.
    """
    padded = pad_to_multiple(pad_to_multiple(weight, r, dim=-1), r, dim=-2)
    return padded.reshape(padded.shape[0] // r, -1, r)


def tile_count(block: Tensor, out_features: int) -> int:
    """How often an output shard of the block's size fits into out_features."""
    if out_features % block.shape[-1]:
        raise ArgumentError(
            f"a block of shape {tuple(block.shape)} does not fit an output of {out_features}: "
            f"{block.shape[-1]} must divide it"
        )
    return out_features // block.shape[-1]


def repeat_tile(x: Tensor, tiles: int) -> Tensor:
    """Repeat the last dimension (r_out) until it is as long as the output."""
    return x if tiles == 1 else repeat(x, "... r_out -> ... (tiles r_out)", tiles=tiles)


def merge_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which updates are added to a weight of that dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merged_weight(weight: Tensor, deltas: Iterable[tuple[Tensor, Scale]]) -> Tensor:
    """Return W + sum of s * dW, computed in float32 (float64 for float64) and rounded once.

    Args:
        weight: W.
        deltas: pairs of dW (W's shape) and its scale s.

    Returns:
        Tensor of W's shape and dtype; W itself where there are no deltas.

    Examples:
        >>> import torch
        >>> from disha.functional import merged_weight
        >>> merged_weight(torch.ones(2), [(torch.ones(2), 0.5), (torch.ones(2), 2.0)])
        tensor([3.5000, 3.5000])
    """
    dtype = merge_dtype(weight.dtype)
    total = weight.to(dtype)
    for delta, scale in deltas:
        total = total + delta.to(dtype) * scale
    return total.to(weight.dtype)


def widened_block(block: Tensor, r: int, wider: int, dim: int = 0) -> Tensor:
    """Return a block for larger shards that gives the same dW: D'[j] = D[j mod r].

    Args:
        block: D of Bone or a tile; several groups of r each may follow each other along `dim`.
        r: shard size of the block.
        wider: the larger shard size, a multiple of r.
        dim: the dimension along which the inputs' shards run.

    Returns:
        Tensor of D's shape with `wider` in the place of each r.

    Source: arXiv 2409.15371, section 3, by the definition of dW.

    Examples:
        >>> import torch
        >>> from disha.functional import widened_block
        >>> widened_block(torch.tensor([[1.0], [2.0]]), 2, 4).T
        tensor([[1., 2., 1., 2.]])
    """
    if wider == r:
        return block
    groups = torch.unflatten(block, dim, (-1, r))
    return torch.cat([groups] * (wider // r), dim + 1).flatten(dim, dim + 1)


def weighted_sum(parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Return the sum of f * D, computed in float32 (float64 for float64) and rounded once.

    All kinds of updates are linear in D, so this is the block of the sum of f * dW.

    Args:
        parts: pairs of a block and its factor f, at least one; all blocks of one shape.

    Returns:
        Tensor of that shape, in the dtype that all of theirs promote to.

    Examples:
        >>> import torch
        >>> from disha.functional import weighted_sum
        >>> weighted_sum([(torch.ones(2), 0.5), (torch.ones(2), 2.0)])
        tensor([2.5000, 2.5000])
    """
    dtype = reduce(torch.promote_types, (block.dtype for block, _ in parts))
    return merged_weight(parts[0][0].new_zeros(parts[0][0].shape, dtype=dtype), parts)


def added(fresh: Tensor, delta: Tensor) -> Tensor:
    """Return fresh + delta in the dtype of the first, written into it where that can't be seen.

    Args:
        fresh: a result that nobody else has, of an operation that does not keep it for backward.
        delta: what to add, of its shape.

    Examples:
        >>> import torch
        >>> from disha.functional import added
        >>> added(torch.ones(2), torch.tensor([1.0, 2.0]))
        tensor([2., 3.])
    """
    delta = delta.to(fresh.dtype)
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return fresh + delta if transformed or fresh._is_view() else fresh.add_(delta)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which products are computed in their operands' own dtype.

    Args:
        device: where the operands are.

    Examples:
        >>> import torch
        >>> from disha.functional import without_autocast
        >>> x = torch.ones(2, 2)
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     with without_autocast(x.device):
        ...         exact = x @ x
        ...     print((x @ x).dtype, exact.dtype)
        torch.bfloat16 torch.float32
    """
    # Entering autocast to switch it off takes as long as a small product; meta has none.
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
