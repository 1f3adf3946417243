"""Let torch's transformer encoders return the same with adapted weights as with plain ones.

In evaluation, torch runs a fused kernel if all weights are plain tensors. If a weight is adapted,
other code runs in its place, and two hooks of the encoder layer let that do as the kernel does:

- It takes a nested tensor, which an encoder makes of a batch with padding.
- It returns the dtype of autocast, on a CPU under autocast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from disha.layers.quantized import remove_hook

EncoderLayer = nn.TransformerEncoderLayer
_LENGTHS = "_disha_lengths"
"""The attribute of a padded tensor with the lengths of the nested one that it stands for."""


def guard_encoder(layer: EncoderLayer, adapted: bool) -> None:
    """Let an encoder layer return the same with adapted weights; undo that if it has none."""
    if not adapted:
        remove_hook(layer, _pad_nested)
        remove_hook(layer, _return_as_fused)
    elif _return_as_fused not in layer._forward_hooks.values():
        layer.register_forward_pre_hook(_pad_nested, with_kwargs=True)
        layer.register_forward_hook(_return_as_fused, with_kwargs=True, prepend=True)


def _pad_nested(
    layer: EncoderLayer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Replace a nested input, which has no mask beside it, by a padded one with its mask."""
    source = args[0] if args else kwargs["src"]
    if not source.is_nested:
        return None
    lengths = [len(sample) for sample in source.unbind()]
    padded = source.to_padded_tensor(0.0)
    setattr(padded, _LENGTHS, lengths)
    positions = torch.arange(padded.shape[1], device=padded.device)
    mask = positions >= torch.tensor(lengths, device=padded.device).unsqueeze(1)
    return (), {"src": padded, "src_key_padding_mask": mask}


def _return_as_fused(
    layer: EncoderLayer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor:
    """Return the output as torch's fused kernel would."""
    output = _cast_as_fused(layer, output)
    lengths = getattr(kwargs.get("src"), _LENGTHS, None)
    if lengths is None:
        return output
    samples = [sample[:length] for sample, length in zip(output, lengths)]
    return torch.nested.as_nested_tensor(samples)


def _cast_as_fused(layer: EncoderLayer, output: Tensor) -> Tensor:
    """Return the output in the dtype of the fused kernel, where torch would run it."""
    if layer.training or torch.is_grad_enabled() or not torch.is_autocast_enabled("cpu"):
        return output
    if output.device.type == "cpu" and output.dim() == 3 and _can_be_fused(layer):
        return output.to(torch.get_autocast_dtype("cpu"))
    return output


def _can_be_fused(layer: EncoderLayer) -> bool:
    """Whether torch would run its fused kernel for a layer if all of its weights were plain."""
    if not torch.backends.mha.get_fastpath_enabled():
        return False
    if type(layer).forward is not nn.TransformerEncoderLayer.forward:
        return False
    attention = layer.self_attn
    if not attention.batch_first or attention.in_proj_bias is None or attention.num_heads % 2:
        return False
    return layer.activation_relu_or_gelu > 0 and layer.norm1.eps == layer.norm2.eps
