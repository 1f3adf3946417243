"""Attention: torch's own function, with projections that are products of effective weights.

    F.multi_head_attention_forward = out(softmax(q k^T / sqrt(E) + masks) v)

q, k and v are projections of the inputs, and `out` is one of the result. Inputs are (positions,
samples, width).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from disha.effective.products import multiply_linear
from disha.effective.rules import rule
from disha.effective.views import split_outputs
from disha.effective.weight import EffectiveWeight, compute
from disha.private_torch import attention_with_projections


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
    *args: Any,
    **options: Any,
) -> Any:
    inputs = query, key, value, bias_k, bias_v
    if any(isinstance(x, EffectiveWeight) for x in inputs):
        return NotImplemented
    output, weights = _attend_without_output(
        query,
        key,
        value,
        embed_dim_to_check,
        num_heads,
        in_proj_weight,
        in_proj_bias,
        bias_k,
        bias_v,
        add_zero_attn,
        dropout_p,
        out_proj_weight,
        out_proj_bias,
        *args,
        **options,
    )
    if query.dim() == 3:
        return _project(output, out_proj_weight, out_proj_bias), weights
    output = output.unsqueeze(1)  # one sample, as torch's function does
    return _project(output, out_proj_weight, out_proj_bias).squeeze(1), weights


def _project(x: Tensor, weight: Any, bias: Tensor | None) -> Any:
    """Return the projection of x (positions, samples, width)."""
    if not isinstance(weight, EffectiveWeight):
        return F.linear(x, weight, bias)
    is_routed = weight.updates.is_routed
    if is_routed:
        x = x.transpose(0, 1)  # a routed product takes samples first
    output: Any = multiply_linear(x, weight, bias)
    return output.transpose(0, 1).contiguous() if is_routed else output


def _project_separately(*operands: Any) -> list[Any]:
    """Return q, k and v of three inputs, three weights, and three biases or None."""
    inputs, weights, biases = operands[:3], operands[3:6], operands[6:]
    return [_project(*operands) for operands in zip(inputs, weights, biases)]


def _project_packed(
    query: Tensor, key: Tensor, value: Tensor, weight: Any, bias: Tensor | None
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
        projected = torch.unflatten(_project(x, part, part_bias), -1, (count, width))
        projections += projected.movedim(-2, 0).contiguous().unbind(0)
    return projections


def _split_packed(weight: Any, sizes: list[int]) -> Any:
    """Cut a packed weight into parts of these numbers of outputs."""
    if not isinstance(weight, EffectiveWeight):
        return torch.split(weight, sizes)
    if len(sizes) == 1:
        return [weight]
    parts: Any = split_outputs(weight, torch.split(weight.base, sizes))
    if parts is NotImplemented:  # a block across the borders of q, k and v can't be cut
        return torch.split(compute(weight), sizes)
    return parts


_attend_without_output = attention_with_projections(_project_separately, _project_packed)
