"""W x + b of a linear layer's own weight: the bits of `F.linear`, for few tokens in less time.

For a product of a few rows and a large matrix, MKL packs (copies) the matrix for that one use, and
leaves threads waiting. A batch of products with blocks of the matrix's rows was measured to take
half to four fifths of the time, on two threads. One token is left alone: that product, of a matrix
and a vector, runs on one thread, which a busy machine slows down less than threads that wait for
each other.

In blocks too, each output is one sum over the inputs. Whether it is added up in the same order
depends on the sizes, the number of threads and the processor; so each size is tried once, with
random inputs, and where any bit differs blocks are not used. A layer with a block of zeros thus
returns exactly what the plain one does.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["LARGE_WEIGHT", "base_product"]

LARGE_WEIGHT = 2**19
"""From so many numbers in the weight on, blocks were measured to be faster."""

LEAST_TOKENS, MOST_TOKENS = 2, 64
"""For how many tokens they were."""

LEAST_ROWS, MOST_ROWS = 64, 256
"""How many of the weight's rows make a block."""

_WITH_MKL: bool = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
_same_bits: dict[tuple[int, ...], bool] = {}
"""Threads, tokens, in, out, whether there is a bias -> whether both ways return the same bits."""


def base_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return W x + b, as `F.linear` does, bit for bit; without recording gradients.

    Args:
        x: input (..., in).
        weight: W (out, in).
        bias: b (out,), or None.

    Returns:
        Tensor (..., out).

    Examples:
        >>> import torch
        >>> from disha.functional.products import base_product
        >>> base_product(torch.ones(1, 3), torch.eye(3), torch.ones(3))
        tensor([[2., 2., 2.]])
    """
    if _fits_blocks(x, weight, bias):
        tokens = x if x.dim() == 2 else x.view(-1, x.shape[-1])
        if _returns_same_bits(tokens, weight, bias):
            output = _in_blocks(tokens, weight, bias)
            return output if x.dim() == 2 else output.view(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight, bias)


def _fits_blocks(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether blocks compute this product, and are the faster way to."""
    if not _WITH_MKL or torch._C._is_tracing() or weight.numel() < LARGE_WEIGHT:
        return False  # a trace is for any number of tokens
    # Where a mode watches or replaces operations, it sees the one that it would without adapters.
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    operands = (x, weight) if bias is None else (x, weight, bias)
    if any(one.dtype != torch.float32 or one.device.type != "cpu" for one in operands):
        return False
    out_features, in_features = weight.shape
    if x.dim() < 2 or x.shape[-1] != in_features or not _block_rows(out_features):
        return False
    if not LEAST_TOKENS <= x.numel() // in_features <= MOST_TOKENS:
        return False
    # Of x in another layout, F.linear makes another product.
    rows_apart = x.dim() == 2 and x.stride(1) == 1 and x.stride(0) >= in_features
    laid_out = (rows_apart or x.is_contiguous()) and weight.is_contiguous()
    fitting_bias = bias is None or (bias.shape == (out_features,) and bias.is_contiguous())
    exact = torch.get_float32_matmul_precision() == "highest"
    return laid_out and fitting_bias and exact and torch.get_num_threads() > 1


@cache
def _block_rows(out_features: int) -> int:
    """Return how many rows of the weight a block has, or 0 where no size divides it."""
    sizes = range(min(MOST_ROWS, out_features // 2), LEAST_ROWS - 1, -1)
    return next((rows for rows in sizes if out_features % rows == 0), 0)


def _in_blocks(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = _block_rows(weight.shape[0])
    blocks = weight.view(-1, rows, weight.shape[1]).mT
    repeated = tokens.expand(blocks.shape[0], *tokens.shape)
    if bias is None:
        product = torch.bmm(repeated, blocks)
    else:
        product = torch.baddbmm(bias.view(-1, 1, rows), repeated, blocks)
    # (blocks, tokens, rows), of which there are several each: this copies, and is no view.
    return product.transpose(0, 1).reshape(tokens.shape[0], -1)


def _returns_same_bits(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether blocks return what `F.linear` does for these sizes; tried where it isn't known."""
    key = (torch.get_num_threads(), *tokens.shape, weight.shape[0], bias is not None)
    if key not in _same_bits:
        generator = torch.Generator(device="cpu").manual_seed(0)
        trial = torch.randn(tokens.shape, generator=generator, dtype=torch.float32, device="cpu")
        blocks, plain = _in_blocks(trial, weight, bias), F.linear(trial, weight, bias)
        _same_bits[key] = torch.equal(blocks, plain) and _order_matters(weight)
    return _same_bits[key]


def _order_matters(weight: Tensor) -> bool:
    """Whether sums over a weight's rows show their order: of zeros, any gives the same."""
    return bool((weight.count_nonzero(1) > weight.shape[1] // 2).all())
