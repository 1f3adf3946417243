"""What torch's transformer encoders decide by asking whether their weights are plain tensors.

In evaluation, torch runs a fused layer on plain weights only. So an adapted encoder hands no nested
tensors on. On a CPU the fused layer returns autocast's dtype, the other one float32: a hook gives
the output of an adapted layer the former.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from disha.layers.quantized import remove_hook

_KEPT = "_disha_nests"
"""Attribute of a guarded encoder: whether torch would use nested tensors."""

Encoder = nn.TransformerEncoder | nn.TransformerEncoderLayer


def guard_encoder(encoder: Encoder, adapted: bool) -> None:
    """Make an encoder compute the same with adapted weights, or undo that if it has none."""
    if isinstance(encoder, nn.TransformerEncoder):
        nests = encoder.__dict__.pop(_KEPT, encoder.use_nested_tensor)
        encoder.use_nested_tensor = nests and not adapted
        if adapted:
            encoder.__dict__[_KEPT] = nests
    elif not adapted:
        remove_hook(encoder, _cast_as_fused)
    elif _cast_as_fused not in encoder._forward_hooks.values():
        encoder.register_forward_hook(_cast_as_fused, with_kwargs=True, prepend=True)


def _cast_as_fused(
    layer: nn.TransformerEncoderLayer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor:
    """Return the output in the dtype of torch's fused layer, where torch would use that one."""
    if layer.training or torch.is_grad_enabled() or not torch.is_autocast_enabled("cpu"):
        return output
    attention = layer.self_attn
    fuses = (
        torch.backends.mha.get_fastpath_enabled()
        and type(layer).forward is nn.TransformerEncoderLayer.forward
        and attention.batch_first
        and attention.in_proj_bias is not None
        and attention.num_heads % 2 == 0
        and layer.activation_relu_or_gelu
        and layer.norm1.eps == layer.norm2.eps
        and output.dim() == 3
        and output.device.type == "cpu"
    )
    return output.to(torch.get_autocast_dtype("cpu")) if fuses else output
