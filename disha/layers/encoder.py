"""Let torch's transformer encoders return the same with adapted weights as with plain ones.

In evaluation, torch runs a fused kernel if all weights are plain tensors. If a weight is adapted:

- The encoder makes no nested tensors, which only the fused kernel can take.
- A hook casts the output of a layer: on a CPU under autocast, the fused kernel returns autocast's
  dtype, and the layers that replace it return float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from disha.layers.quantized import remove_hook

_FORMER_FLAG = "_disha_nests"
"""The attribute of a guarded encoder with its former `use_nested_tensor`."""

Encoder = nn.TransformerEncoder | nn.TransformerEncoderLayer


def guard_encoder(encoder: Encoder, adapted: bool) -> None:
    """Let an encoder return the same with adapted weights; undo that if it has none any more."""
    if isinstance(encoder, nn.TransformerEncoder):
        former = encoder.__dict__.pop(_FORMER_FLAG, encoder.use_nested_tensor)
        encoder.use_nested_tensor = former and not adapted
        if adapted:
            encoder.__dict__[_FORMER_FLAG] = former
    elif not adapted:
        remove_hook(encoder, _cast_as_fused)
    elif _cast_as_fused not in encoder._forward_hooks.values():
        encoder.register_forward_hook(_cast_as_fused, with_kwargs=True, prepend=True)


def _cast_as_fused(
    layer: nn.TransformerEncoderLayer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor:
    """Return the output in the dtype of the fused kernel, where torch would run it."""
    if layer.training or torch.is_grad_enabled() or not torch.is_autocast_enabled("cpu"):
        return output
    if output.device.type == "cpu" and output.dim() == 3 and _can_be_fused(layer):
        return output.to(torch.get_autocast_dtype("cpu"))
    return output


def _can_be_fused(layer: nn.TransformerEncoderLayer) -> bool:
    """Whether torch would run its fused kernel for a layer if all of its weights were plain."""
    if not torch.backends.mha.get_fastpath_enabled():
        return False
    if type(layer).forward is not nn.TransformerEncoderLayer.forward:
        return False
    attention = layer.self_attn
    if not attention.batch_first or attention.in_proj_bias is None or attention.num_heads % 2:
        return False
    return layer.activation_relu_or_gelu > 0 and layer.norm1.eps == layer.norm2.eps
