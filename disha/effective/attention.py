"""Attention: what torch's function computes, with projections that are products.

    F.multi_head_attention_forward = out(softmax(q k^T / sqrt(E) + masks) v)

q, k and v are projections of the inputs, and `out` is one of the result. Inputs are (positions,
samples, width), and the heads of all samples are one axis: (samples * heads, positions, E). The
argument `heads` of the functions below is (samples, heads of a sample).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from disha.effective.products import multiply_linear
from disha.effective.rules import rule
from disha.effective.views import split_rows
from disha.effective.weight import EffectiveWeight, compute
from disha.errors import ArgumentError


@rule(F.multi_head_attention_forward)
def _attend(
    query: Any,
    key: Any,
    value: Any,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Any,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Any,
    out_proj_bias: Any,
    training: bool = True,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    static_k: Any = None,
    static_v: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    tensors = (query, key, value, bias_k, bias_v, key_padding_mask, attn_mask, static_k, static_v)
    if any(isinstance(tensor, EffectiveWeight) for tensor in tensors):
        return NotImplemented
    is_batched = query.dim() == 3
    if not is_batched:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    length, samples, width = query.shape
    _check_call(width, embed_dim_to_check, is_causal, attn_mask)

    project = partial(_project, is_batched)
    if use_separate_proj_weight:
        matrices = q_proj_weight, k_proj_weight, v_proj_weight
        q, k, v = _project_separately(project, (query, key, value), matrices, in_proj_bias)
    else:
        q, k, v = _project_packed(project, query, key, value, in_proj_weight, in_proj_bias)
    if bias_k is not None:
        assert static_k is None, "bias cannot be added to static key."
        assert static_v is None, "bias cannot be added to static value."
        k = torch.cat([k, bias_k.repeat(1, samples, 1)])
        v = torch.cat([v, bias_v.repeat(1, samples, 1)])

    heads = samples, num_heads
    q = _cut_into_heads(q, heads)
    k = _cut_into_heads(k, heads) if static_k is None else static_k
    v = _cut_into_heads(v, heads) if static_v is None else static_v
    if add_zero_attn:
        k = F.pad(k, (0, 0, 0, 1))
        v = F.pad(v, (0, 0, 0, 1))

    # The caller vouches that `attn_mask` is the causal one, so the kernel can make that mask.
    kernel_masks = is_causal and key_padding_mask is None and not need_weights
    added_keys = int(bias_k is not None) + int(add_zero_attn)
    mask = None
    if attn_mask is not None and not kernel_masks:
        # `key`, and not `k`, because a mask does not cover the added keys.
        shape = samples * num_heads, length, key.shape[0]
        mask = _prepare_mask(attn_mask, query.dtype, shape, added_keys)
    if key_padding_mask is not None:
        padding = _prepare_padding(key_padding_mask, query.dtype, heads, k.shape[1], added_keys)
        mask = padding if mask is None else mask + padding

    dropout = dropout_p if training else 0.0
    weights = None
    if need_weights:
        output, weights = _attend_with_weights(q, k, v, mask, dropout, heads)
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        output = _attend_by_kernel(q, k, v, mask, dropout, heads, kernel_masks)
    output = output.contiguous().view(length, samples, width)
    output = project(output, out_proj_weight, out_proj_bias)
    if is_batched:
        return output, weights
    return output.squeeze(1), None if weights is None else weights.squeeze(0)


def _check_call(width: int, expected_width: int, is_causal: bool, attn_mask: Tensor | None) -> None:
    """Raise as torch does if the arguments do not go together."""
    assert width == expected_width, (
        f"was expecting embedding dimension of {expected_width}, but got {width}"
    )
    if is_causal and attn_mask is None:
        raise RuntimeError(
            "Need attn_mask if specifying the is_causal hint. You may use the Transformer module "
            "method `generate_square_subsequent_mask` to create this mask."
        )


def _project(is_batched: bool, x: Tensor, weight: Any, bias: Tensor | None) -> Any:
    """Return the projection of x (positions, samples, width)."""
    if not isinstance(weight, EffectiveWeight):
        return F.linear(x, weight, bias)
    is_routed = weight.updates.is_routed
    if is_routed:
        if not is_batched:
            raise ArgumentError(
                "route_adapters needs samples, but an attention got a query without a batch "
                "dimension; pass a batch, or use one adapter at a time"
            )
        x = x.transpose(0, 1)  # a routed product takes samples first
    output: Any = multiply_linear(x, weight, bias)
    if output is NotImplemented:
        output = F.linear(x, compute(weight), bias)
    return output.transpose(0, 1).contiguous() if is_routed else output


def _project_separately(
    project: Any, inputs: Sequence[Tensor], weights: Sequence[Any], bias: Tensor | None
) -> list[Any]:
    """Return q, k and v, each of a weight of its own; they share one bias."""
    biases = [None] * 3 if bias is None else bias.chunk(3)
    return [project(*operands) for operands in zip(inputs, weights, biases)]


def _project_packed(
    project: Any, query: Tensor, key: Tensor, value: Tensor, weight: Any, bias: Tensor | None
) -> list[Tensor]:
    """Return q, k and v of one weight that has all three; equal inputs share a product."""
    # The inputs, and how many of q, k and v each of them makes.
    if key is not value:
        inputs, counts = [query, key, value], [1, 1, 1]
    elif query is not key:
        inputs, counts = [query, key], [1, 2]
    else:
        inputs, counts = [query], [3]
    width = query.shape[-1]
    sizes = [count * width for count in counts]
    # Method of C++: `torch.split` takes four Python calls.
    biases = [None] * len(sizes) if bias is None else bias.split_with_sizes(sizes)
    projections: list[Tensor] = []
    for x, part, part_bias, count in zip(inputs, _split_packed(weight, sizes), biases, counts):
        projected = torch.unflatten(project(x, part, part_bias), -1, (count, width))
        projections += projected.movedim(-2, 0).contiguous().unbind(0)
    return projections


def _split_packed(weight: Any, sizes: list[int]) -> Any:
    """Cut a packed weight into parts of these numbers of rows."""
    if not isinstance(weight, EffectiveWeight):
        return torch.split(weight, sizes)
    if len(sizes) == 1:
        return [weight]
    parts: Any = split_rows(weight, torch.split(weight.base, sizes))
    if parts is NotImplemented:  # a block across the borders of q, k and v can't be cut
        return torch.split(compute(weight), sizes)
    return parts


def _cut_into_heads(x: Tensor, heads: tuple[int, int]) -> Tensor:
    """Return (positions, samples, width) as (samples * heads, positions, E)."""
    samples, num_heads = heads
    positions, _, width = x.shape
    return x.view(positions, samples * num_heads, width // num_heads).transpose(0, 1)


def _prepare_mask(
    mask: Tensor, dtype: torch.dtype, shape: tuple[int, int, int], added_keys: int
) -> Tensor:
    """Return what `attn_mask` adds to the scores; `shape` is the one for the mask of each head."""
    mask = _as_addend(mask, "attn_mask", dtype)
    return _pad_keys(_for_each_head(mask, shape), added_keys)


def _prepare_padding(
    padding: Tensor, dtype: torch.dtype, heads: tuple[int, int], keys: int, added_keys: int
) -> Tensor:
    """Return what `key_padding_mask` adds to the scores (samples * heads, 1, keys)."""
    samples, num_heads = heads
    padding = _pad_keys(_as_addend(padding, "key_padding_mask", dtype), added_keys)
    _check_padding(padding, samples, keys)
    return padding[:, None, None].expand(-1, num_heads, -1, -1).flatten(0, 1)


def _as_addend(mask: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """Return a mask as what is added to the scores: -inf where a boolean mask is true."""
    if mask.is_floating_point():
        return mask
    assert mask.dtype == torch.bool, f"only bool and floating types of {name} are supported"
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _for_each_head(mask: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return a mask (heads of all samples, length, keys), or (1, length, keys) for all heads."""
    expected = shape if mask.dim() == 3 else shape[1:]
    if mask.shape != expected:
        raise RuntimeError(
            f"The shape of the {mask.dim()}D attn_mask is {mask.shape}, but should be {expected}."
        )
    return mask if mask.dim() == 3 else mask[None]


def _pad_keys(mask: Tensor, added_keys: int) -> Tensor:
    """Extend a mask to keys that are added behind those of the input, which it does not hide."""
    return F.pad(mask, (0, added_keys)) if added_keys else mask


def _check_padding(padding: Tensor, samples: int, length: int) -> None:
    for axis, expected in enumerate((samples, length)):
        size = padding.shape[axis]
        assert size == expected, (
            f"Expected key_padded_mask.shape[{axis}] to be {expected}, but got {size}"
        )


def _attend_with_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    heads: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Return the values that are attended to (length, samples * heads, E), and the weights.

    The weights are (samples, heads, length, keys).
    """
    q = q * math.sqrt(1.0 / q.shape[-1])
    scores = torch.bmm(q, k.mT) if mask is None else torch.baddbmm(mask, q, k.mT)
    weights = scores.softmax(-1)
    if dropout > 0.0:
        weights = F.dropout(weights, dropout)
    return torch.bmm(weights, v).transpose(0, 1), torch.unflatten(weights, 0, heads)


def _attend_by_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    heads: tuple[int, int],
    is_causal: bool,
) -> Tensor:
    """Return the values that are attended to (length, samples, heads, E), by torch's own kernel."""
    q, k, v = (torch.unflatten(x, 0, heads) for x in (q, k, v))
    if mask is not None and len(mask) == 1:  # one for all heads
        mask = mask[None]
    elif mask is not None:
        mask = torch.unflatten(mask, 0, heads)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal).permute(2, 0, 1, 3)
