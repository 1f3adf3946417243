"""Shards of a dimension, their sums, and the sum of a weight and its updates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from disha.errors import ArgumentError
from disha.private_torch import (
    FakeTensor,
    any_autocast,
    in_forward_mode,
    is_tracing,
    is_view,
    must_not_write,
)

Scale = float | Tensor

PLAIN = Tensor, torch.nn.Parameter, FakeTensor
"""The classes of dense tensors. It is a tuple because torch 2.8 compiles no set."""


def shard_count(features: int, r: int) -> int:
    """Return ceil(features / r), the number of shards of r that cover a dimension.

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
        dim: the dimension to cut, counted from the end.

    Returns:
        Tensor (..., r), or (..., r, *positions).

    Source: arXiv 2409.15371, section 3.

    Examples:
        >>> import torch
        >>> from disha.functional import shard_sum
        >>> shard_sum(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), r=2)
        tensor([9., 6.])
    """
    # reduce(x, "... (b r) -> ... r", "sum"), but without einops: this is the hot path
    if x.shape[dim] % r:
        x = pad_to_multiple(x, r, dim)
    return torch.unflatten(x, dim, (-1, r)).sum(dim - 1, dtype=dtype)


def is_inexact(x: Tensor) -> bool:
    """Whether a tensor has floating-point or complex numbers: `inexact`, as numpy calls them."""
    return x.is_floating_point() or x.is_complex()


def as_real(x: Tensor) -> Tensor:
    """Return a complex tensor as its real and imaginary parts, and any other as it is."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def scaled(x: Tensor, scale: Scale) -> Tensor:
    """Return s x; x itself if s is the number 1."""
    is_one = not isinstance(scale, Tensor) and scale == 1.0
    return x if is_one else x * scale


def overflow_safe_shard_sum(x: Tensor, r: int, dim: int = -1) -> tuple[Tensor, float]:
    """Return S(x) / f in the dtype of x, and the overflow scale f, to multiply a product by.

    A float16 sum of n shards can overflow where the layer's output does not. So if the product is
    in float16, f is the smallest power of two that is at least n. A power of two changes no digit
    of the sums. Otherwise, f is 1.
    """
    product_dtype = torch.get_autocast_dtype(x.device.type) if is_cast(x) else x.dtype
    if product_dtype != torch.float16:
        return shard_sum(x, r, dim=dim), 1.0
    overflow_scale = float(2 ** (shard_count(x.shape[dim], r) - 1).bit_length())
    sums = shard_sum(x, r, torch.float32, dim)
    return (sums / overflow_scale).to(x.dtype), overflow_scale


def tiled(block: Tensor, out_features: int) -> Tensor:
    """Repeat a block's last dimension (r_out) until it is as long as the output."""
    r_out = block.shape[-1]
    if r_out == out_features:
        return block
    if out_features % r_out:
        raise ArgumentError(
            f"a block of shape {tuple(block.shape)} does not fit an output of {out_features}: "
            f"{r_out} must divide it"
        )
    return _repeat_last(block, out_features // r_out)


def repeat_over_shards(matrix: Tensor, in_features: int) -> Tensor:
    """Return (..., r) repeated over the shards of the inputs, and cropped to (..., in)."""
    return _repeat_last(matrix, shard_count(in_features, matrix.shape[-1]))[..., :in_features]


def _repeat_last(x: Tensor, times: int) -> Tensor:
    # repeat(x, "... n -> ... (times n)"), but without einops: compiled graphs would guard its cache
    # of shapes.
    return x.repeat(*(1,) * (x.dim() - 1), times)


def shard_sum_matrix(up: Tensor, in_features: int) -> Tensor:
    """Return A (..., r, in) = [I_r I_r ... I_r] for an R (..., r, out), with S(x) = A x."""
    r = up.shape[-2]
    identity = torch.eye(r, dtype=up.dtype, device=up.device)
    return repeat_over_shards(identity, in_features).expand(*up.shape[:-2], r, in_features)


def multiply_by_matrix(
    sums: Tensor,
    matrix: Tensor,
    out_features: int,
    scale: float = 1.0,
    output: Tensor | None = None,
) -> Tensor:
    """Return s sums @ matrix, tiled, added to an output if there is one: in one step if possible.

    The output must be new, as for `add_to`.
    """
    matrix = matrix.to(sums.dtype)
    has_tiles = matrix.shape[-1] != out_features
    if output is None or output.dim() != 2 or output.dtype != sums.dtype or has_tiles:
        delta = tiled(scaled(sums @ matrix, scale), out_features)
        return delta if output is None else add_to(output, delta)
    if is_compiling() or must_not_write():
        return torch.addmm(output, sums, matrix, alpha=scale)
    return output.addmm_(sums, matrix, alpha=scale)


SHARD_CORRELATION = 0.05
"""Of two shards of the inputs of a layer. It was chosen so that the rates of the study agree."""


def size_of_sum(shards: float) -> float:
    """Return the size of a sum of so many shards of size 1."""
    return math.sqrt(shards * (1 + (shards - 1) * SHARD_CORRELATION))


def merge_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype in which updates are added to a weight of one of these dtypes.

    This is float32, or float64 if one of them is that wide; for complex ones, their counterparts.
    """
    is_wide = torch.float64 in dtypes or torch.complex128 in dtypes
    if any(dtype.is_complex for dtype in dtypes):
        return torch.complex128 if is_wide else torch.complex64
    return torch.float64 if is_wide else torch.float32


def merged_weight(weight: Tensor, deltas: Iterable[tuple[Tensor, Scale]]) -> Tensor:
    """Return W + sum of s * dW, computed in float32 (float64 for float64) and rounded once.

    The complex counterparts are complex64 and complex128.

    Args:
        weight: W.
        deltas: pairs of dW (W's shape) and its scale s.

    Returns:
        Tensor of W's shape and dtype.

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

    Where the method is `additive`, this is the block of the sum of f * dW.

    Args:
        parts: pairs of a block and its multiplier f, at least one; all blocks of one shape.

    Returns:
        Tensor of that shape, in the dtype that the blocks promote to.

    Examples:
        >>> import torch
        >>> from disha.functional import weighted_sum
        >>> weighted_sum([(torch.ones(2), 0.5), (torch.ones(2), 2.0)])
        tensor([2.5000, 2.5000])
    """
    dtype = reduce(torch.promote_types, (block.dtype for block, _ in parts))
    return merged_weight(torch.zeros_like(parts[0][0], dtype=dtype), parts)


def add_to(output: Tensor, delta: Tensor) -> Tensor:
    """Return output + delta in the output's dtype; in place if a copy is not needed.

    The output must be new, as that of a product: nobody else has it, and backward does not read it.
    """
    delta = delta.to(output.dtype)
    must_copy = is_compiling() or must_not_write() or is_view(output)
    return output + delta if must_copy else output.add_(delta)


def may_define_backward(*operands: Tensor) -> bool:
    """Whether a product of these tensors may be an `autograd.Function`.

    It may not where others must see its operations: the compiler, transforms, forward-mode
    derivatives, selective checkpointing, and tensors of other classes. In a trace of TorchScript,
    it would be a call of Python, which can't be saved.
    """
    if is_compiling() or is_tracing() or must_not_write() or in_forward_mode():
        return False
    return {type(operand) for operand in operands}.issubset(PLAIN)


def autocasts(x: Tensor) -> bool:
    """Return whether autocast casts the operands of products on the device of x now."""
    # The check for any autocast takes a fifth of the time of the other one.
    if not any_autocast() and _knows_device_of(x):
        return False
    name = x.device.type
    return name != "meta" and torch.is_autocast_enabled(name)  # meta has no autocast


def _knows_device_of(x: Tensor) -> bool:
    """Whether torch's check for any autocast knows the device of x."""
    return x.is_cpu or x.is_cuda


def is_cast(x: Tensor) -> bool:
    """Return whether autocast casts x in a product now: float64 and complex numbers stay."""
    return x.is_floating_point() and x.dtype != torch.float64 and autocasts(x)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which products are computed in their operands' own dtype."""
    # Entering autocast to switch it off takes as long as a small product.
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()
