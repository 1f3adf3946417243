"""W x + b of a linear layer's own weight: the bits of `F.linear`, for few tokens in less time.

MKL's product of few rows and a large matrix leaves threads idle and copies a matrix that it uses
once. Cut into blocks of the matrix's rows, as a batch of products, it was measured to take a third
to four fifths of the time. Each output is then one sum over the inputs as before, and mostly comes
out the same bit for bit; for sizes where it does not, on this machine and with as many threads,
the batch is not used, so that a layer with a block of zeros returns what the plain one does.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LARGE_WEIGHT", "base_product"]

FEW_TOKENS = 64
LARGE_WEIGHT = 2**19
"""Up to so many tokens and from so many weights on, in float32, batches were measured faster."""

MOST_ROWS, LEAST_ROWS = 256, 64
"""How many of the weight's rows make a block."""

_WITH_MKL: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
_same_bits: dict[tuple[int, ...], bool] = {}
"""Threads, tokens, in, out, whether there is a bias -> whether both ways return the same bits."""


def base_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return W x + b, as `F.linear` does, for operands that are `fusible` and of one dtype.

    Args:
        x: input (tokens, in).
        weight: W (out, in), contiguous.
        bias: b (out,), or None.

    Returns:
        Tensor (tokens, out), contiguous.

    Examples:
        >>> import torch
        >>> from disha.functional.products import base_product
        >>> base_product(torch.ones(1, 3), torch.eye(3), torch.ones(3))
        tensor([[2., 2., 2.]])
    """
    rows = _block_rows(x, weight)
    if rows and _returns_same_bits(x, weight, bias, rows):
        return _in_blocks(x, weight, bias, rows)
    return F.linear(x, weight, bias)


def _block_rows(x: Tensor, weight: Tensor) -> int:
    """Return into blocks of how many rows to cut the weight, or 0 where that is no faster."""
    if torch._C._is_tracing():
        return 0  # a trace is for any number of tokens
    (tokens, in_features), out_features = x.shape, weight.shape[0]
    if not 0 < tokens <= FEW_TOKENS or weight.numel() < LARGE_WEIGHT or not _WITH_MKL:
        return 0
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        return 0
    # Where x is laid out in another way, or does not fit, F.linear has ways and words of its own.
    if in_features != weight.shape[1] or x.stride(1) != 1 or x.stride(0) < in_features:
        return 0
    return _dividing_rows(out_features)


@cache
def _dividing_rows(out_features: int) -> int:
    sizes = range(MOST_ROWS, LEAST_ROWS - 1, -1)
    return next((rows for rows in sizes if out_features % rows == 0), 0)


def _in_blocks(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    blocks = weight.view(-1, rows, weight.shape[1]).mT
    each = x.expand(blocks.shape[0], *x.shape)
    if bias is None:
        product = torch.bmm(each, blocks)
    else:
        product = torch.baddbmm(bias.view(-1, 1, rows), each, blocks)
    return product.transpose(0, 1).reshape(x.shape[0], -1)


def _returns_same_bits(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> bool:
    key = (torch.get_num_threads(), *x.shape, weight.shape[0], bias is not None)
    if key not in _same_bits:
        # Not x itself: of zeros, say, every order gives the same sum.
        numbers = torch.Generator(device=x.device).manual_seed(0)
        trial = torch.randn(x.shape, generator=numbers, dtype=x.dtype, device=x.device)
        both = (_in_blocks(trial, weight, bias, rows), F.linear(trial, weight, bias))
        _same_bits[key] = torch.equal(*both)
    return _same_bits[key]
