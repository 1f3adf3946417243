"""Attention: torch's own function, with projections that are products of effective weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from disha.effective.products import linear_product
from disha.effective.rules import rule
from disha.effective.views import in_parts
from disha.effective.weight import EffectiveWeight, computed, effective
from disha.private_torch import attention_with


@rule(F.multi_head_attention_forward)
def _attention(
    query: Any,
    key: Any,
    value: Any,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Attention by a copy of torch's code, which would itself call this rule again."""
    if _ATTENTION is None:
        return NotImplemented
    if isinstance(in_proj_weight, EffectiveWeight) and not query is key is value:
        parts = in_parts(in_proj_weight, torch.chunk(in_proj_weight.base, 3))
        if parts is NotImplemented:  # a block across the borders of q, k and v can't be split
            parts = torch.chunk(computed(in_proj_weight), 3)
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        kwargs |= {"use_separate_proj_weight": True, **dict(zip(names, parts))}
        in_proj_weight = None
    weights = [
        _in_attention(value, query) if type(value) is EffectiveWeight else value
        for value in (in_proj_weight, *args)
    ]
    kwargs = {
        name: _in_attention(value, query) if type(value) is EffectiveWeight else value
        for name, value in kwargs.items()
    }
    return _ATTENTION.multi_head_attention_forward(
        query, key, value, embed_dim_to_check, num_heads, *weights, **kwargs
    )


def _in_attention(weight: EffectiveWeight, query: Tensor) -> EffectiveWeight:
    updates = weight.updates.in_attention(query)
    if updates is weight.updates:
        return weight
    return effective(weight.base, weight.weight_layout, updates)


def _attention_linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(weight, EffectiveWeight):
        return linear_product(input, weight, bias)
    return F.linear(input, weight, bias)


def _check_padding(key_padding_mask: Tensor, src_len: int, bsz: int) -> None:
    """Check what torch's attention checks, in a way that can be compiled."""
    for axis, expected in enumerate((bsz, src_len)):
        size = key_padding_mask.shape[axis]
        assert size == expected, (
            f"Expected key_padded_mask.shape[{axis}] to be {expected}, but got {size}"
        )


_ATTENTION = attention_with(_attention_linear, _check_padding)
