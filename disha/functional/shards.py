"""What every layer kind shares: cutting dimensions into shards, and adding updates to weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from disha.errors import ArgumentError

__all__ = [
    "Scale",
    "added",
    "merge_dtype",
    "merged_weight",
    "pad_to_multiple",
    "repeat_tile",
    "scaled",
    "scaled_sums",
    "shard_count",
    "shard_sum",
    "shrinking",
    "square_tiles",
    "tile_count",
    "weighted_sum",
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


def shard_sum(x: Tensor, r: int, dtype: torch.dtype | None = None, dim: int = -1) -> Tensor:
    """Sum the shards of a dimension: S(x)[j] = sum over b of x[b r + j].

    Args:
        x: tensor (..., in), or (..., in, *positions) with another `dim`.
        r: shard size, at least 1.
        dtype: dtype to accumulate in and return; x's own by default.
        dim: the dimension that the shards cut, counted from the end.

    Returns:
        Tensor (..., r), or (..., r, *positions).

    Source: arXiv 2409.15371, section 3.

    Examples:
        >>> import torch
        >>> from disha.functional import shard_sum
        >>> shard_sum(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), r=2)
        tensor([9., 6.])
    """
    # reduce(x, "... (b r) -> ... r", "sum"), natively: this is the hot path
    if x.shape[dim] % r:
        x = pad_to_multiple(x, r, dim)
    return torch.unflatten(x, dim, (x.shape[dim] // r, r)).sum(dim - 1, dtype=dtype)


def scaled(x: Tensor, scale: Scale) -> Tensor:
    """Return s x; x itself where s is the number 1.

    Args:
        x: any tensor.
        scale: s, a number or a 0-dim tensor.

    Examples:
        >>> import torch
        >>> from disha.functional.shards import scaled
        >>> scaled(torch.ones(2), 0.5)
        tensor([0.5000, 0.5000])
    """
    return x if not isinstance(scale, Tensor) and scale == 1.0 else x * scale


def scaled_sums(
    x: Tensor, r: int, dtype: torch.dtype, scale: Scale = 1.0, dim: int = -1
) -> tuple[Tensor, float]:
    """Return c s S(x), and the factor 1 / c that a product with it still needs.

    c is below 1 where a sum could overflow in the dtype of the product (`shrinking`).

    Args:
        x: input (..., in), or (..., in, *positions) with another `dim`.
        r: shard size.
        dtype: dtype of the sums, and of the product unless autocast says another.
        scale: runtime scale s.
        dim: the dimension that the shards cut, counted from the end.
    """
    c = shrinking(_product_dtype(dtype, x.device), x.shape[dim], r)
    if c == 1.0:
        return scaled(shard_sum(x, r, dtype, dim), scale), 1.0
    return (shard_sum(x, r, torch.float32, dim) * (scale * c)).to(dtype), 1.0 / c


def _product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which products of operands of a dtype are computed now."""
    kind = device.type
    if dtype == torch.float64 or kind == "meta" or not torch.is_autocast_enabled(kind):
        return dtype
    return torch.get_autocast_dtype(kind)


def shrinking(dtype: torch.dtype, in_features: int, r: int) -> float:
    """Return c, by which shard sums are made smaller where they could overflow.

    A float16 sum of n shards can overflow where the layer's output does not. There c is the
    largest power of two that is at most 1 / n, which changes no digit of the sums. Elsewhere it
    is 1.

    Args:
        dtype: dtype of the product with the sums.
        in_features: size of the input.
        r: shard size.
    """
    if dtype != torch.float16:
        return 1.0
    return float(2.0 ** -(shard_count(in_features, r) - 1).bit_length())


def square_tiles(weight: Tensor, r: int) -> Tensor:
    """Return the r x r tiles of W (..., out, in): a tensor (..., out / r, r * in / r, r).

    Tile (a, b) has the rows i n + b of entry a, with n = in / r. A size that r does not divide is
    zero-padded. Nothing moves in memory: W's row-major (a i) (b k) is "a (i b) k" already.
    """
    padded = pad_to_multiple(pad_to_multiple(weight, r, dim=-1), r, dim=-2)
    return padded.reshape(*padded.shape[:-2], padded.shape[-2] // r, -1, r)


def tile_count(block: Tensor, out_features: int) -> int:
    """Return how often a block's output shard fits into out_features."""
    if out_features % block.shape[-1]:
        raise ArgumentError(
            f"a block of shape {tuple(block.shape)} does not fit an output of {out_features}: "
            f"{block.shape[-1]} must divide it"
        )
    return out_features // block.shape[-1]


def repeat_tile(x: Tensor, tiles: int) -> Tensor:
    """Repeat the last dimension (r_out) until it is as long as the output."""
    if tiles == 1:
        return x
    # repeat(x, "... r_out -> ... (tiles r_out)"), natively: graphs guard what einops has seen
    return x.unsqueeze(-2).expand(*x.shape[:-1], tiles, x.shape[-1]).flatten(-2)


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


def weighted_sum(parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Return the sum of f * D, computed in float32 (float64 for float64) and rounded once.

    Where the method is `linear` in D, this is the block of the sum of f * dW.

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
    """Return fresh + delta in the dtype of `fresh`; adds in place where nobody can notice.

    Args:
        fresh: the result of an operation that does not keep it for backward. Only the caller has
            it.
        delta: what to add, of the same shape.

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
    # Entering autocast to switch it off takes as long as a small product. Meta has no autocast.
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
