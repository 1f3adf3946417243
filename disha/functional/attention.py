"""Multi-head attention between its projections, sequence first as in `torch.nn`.

L target and S source positions, N samples, H heads, E = H * head size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from disha.errors import ArgumentError, ArgumentTypeError

__all__ = ["additive_mask", "attention"]


def additive_mask(mask: Tensor | None, dtype: torch.dtype, name: str) -> Tensor | None:
    """Return a mask as a tensor to add to attention scores: -inf where a bool mask is True.

    Args:
        mask: a bool mask, a floating-point one (returned as it is), or None.
        dtype: dtype of the result for a bool mask.
        name: what to call the mask in an error.

    Raises:
        ArgumentTypeError: the mask is neither bool nor floating-point.

    Examples:
        >>> import torch
        >>> from disha.functional import additive_mask
        >>> additive_mask(torch.tensor([False, True]), torch.float32, "mask")
        tensor([0., -inf])
    """
    if mask is None or mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise ArgumentTypeError(f"{name} must be bool or floating-point, got {mask.dtype}")
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    *,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
    zeros: bool = False,
    dropout: float = 0.0,
    is_causal: bool = False,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return softmax(q k^T / sqrt(E / H) + mask) v for each head, and perhaps the softmax.

    Args:
        q: queries (L, N, E), projected.
        k: keys (S, N, E), projected.
        v: values (S, N, E), projected.
        heads: H.
        mask: added to the scores, (L, S) or (N * H, L, S).
        padding: added to the scores, (N, S).
        zeros: whether to add a key and a value of zeros.
        dropout: probability of zeroing each of the softmax's values.
        is_causal: that the mask, which may then be None, is causal.
        need_weights: whether to return the softmax (N, H, L, S) too.

    Returns:
        The output (L, N, E), and the softmax or None.

    Raises:
        ArgumentError: a mask has another shape than it must have.

    Source: Vaswani et al., "Attention Is All You Need", arXiv 1706.03762.

    Examples:
        >>> import torch
        >>> from disha.functional import attention
        >>> q, k, v = torch.zeros(1, 1, 4), torch.zeros(2, 1, 4), torch.ones(2, 1, 4)
        >>> attention(q, k, v, heads=2)[0]
        tensor([[[1., 1., 1., 1.]]])
    """
    length, samples, width = q.shape
    size = width // heads
    scores = _scores(mask, padding, samples, heads, length, k.shape[0])
    if zeros:
        k, v = (torch.cat([x, x.new_zeros(1, samples, width)]) for x in (k, v))
        scores = None if scores is None else F.pad(scores, (0, 1))
    # pattern: "l n (h d) -> (n h) l d"
    q, k, v = (x.reshape(x.shape[0], samples * heads, size).transpose(0, 1) for x in (q, k, v))
    if need_weights:
        scaled, keys = q * math.sqrt(1.0 / size), k.transpose(-2, -1)
        logits = scaled @ keys if scores is None else torch.baddbmm(scores, scaled, keys)
        weights = F.softmax(logits, dim=-1)
        if dropout > 0.0:
            weights = F.dropout(weights, dropout)
        output = (weights @ v).transpose(0, 1).reshape(length, samples, width)
        return output, weights.view(samples, heads, *weights.shape[1:])
    if scores is not None:
        scores = scores.unsqueeze(0) if len(scores) == 1 else _by_head(scores, heads)
    q, k, v = (_by_head(x, heads) for x in (q, k, v))
    output = F.scaled_dot_product_attention(q, k, v, scores, dropout, is_causal)
    # pattern: "n h l d -> l n (h d)"
    return output.permute(2, 0, 1, 3).reshape(length, samples, width), None


def _by_head(x: Tensor, heads: int) -> Tensor:
    # pattern: "(n h) l d -> n h l d"
    return x.view(x.shape[0] // heads, heads, *x.shape[1:])


def _scores(
    mask: Tensor | None, padding: Tensor | None, samples: int, heads: int, length: int, source: int
) -> Tensor | None:
    """Return what to add to the scores, (1 or N * H, L or 1, S), or None."""
    if mask is not None:
        if tuple(mask.shape) not in ((length, source), (samples * heads, length, source)):
            raise ArgumentError(
                f"attn_mask must be (L, S) = {(length, source)} or (N * heads, L, S) = "
                f"{(samples * heads, length, source)}, got {tuple(mask.shape)}"
            )
        mask = mask if mask.dim() == 3 else mask.unsqueeze(0)
    if padding is None:
        return mask
    if tuple(padding.shape) != (samples, source):
        raise ArgumentError(
            f"key_padding_mask must be (N, S) = {(samples, source)}, got {tuple(padding.shape)}"
        )
    each_head = padding.repeat_interleave(heads, dim=0).unsqueeze(1)
    return each_head if mask is None else mask + each_head
