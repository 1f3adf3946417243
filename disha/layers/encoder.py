"""Keep an `nn.TransformerEncoder` with adapted layers from making padded batches nested.

In evaluation, torch turns a padded batch into nested tensors if the *first* layer seems to have a
fused path. An adapted layer has no fused path, and torch's attention needs that path for nested
tensors. So this module turns nesting off for the encoder. A hook fills the padding of the output
with torch's values.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from disha.layers.hooks import add_first_hook, remove_first_hook

__all__ = ["guard_encoder", "is_guarded", "release_encoder"]

_KEPT = "_disha_nests"
"""Attribute of a guarded encoder: whether torch would use nested tensors."""


def is_guarded(encoder: nn.TransformerEncoder) -> bool:
    """Whether `guard_encoder` was called for it."""
    return _KEPT in encoder.__dict__


def guard_encoder(encoder: nn.TransformerEncoder) -> None:
    """Keep an encoder from using nested tensors. Undone by `release_encoder`."""
    encoder.__dict__[_KEPT] = encoder.use_nested_tensor
    encoder.use_nested_tensor = False
    add_first_hook(encoder, _fill_padding)


def release_encoder(encoder: nn.TransformerEncoder) -> None:
    """Undo `guard_encoder`."""
    encoder.use_nested_tensor = encoder.__dict__.pop(_KEPT)
    remove_first_hook(encoder, _fill_padding)


def _fill_padding(
    encoder: nn.TransformerEncoder, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor:
    """Return the output with torch's values in the padding: zeros, passed through the last norm."""
    call = inspect.signature(nn.TransformerEncoder.forward).bind(encoder, *args, **kwargs)
    named = call.arguments
    padding = named.get("src_key_padding_mask")
    if padding is None or named.get("mask") is not None or named["src"].dim() != 3:
        return output
    padding = padding != 0
    if not _torch_would_nest(encoder, padding):
        return output
    filler = output.new_zeros(1, 1, output.shape[-1])  # 3-d, because a norm may expect it
    filler = filler if encoder.norm is None else encoder.norm(filler)
    return torch.where(padding.unsqueeze(-1), filler, output)


def _torch_would_nest(encoder: nn.TransformerEncoder, padding: Tensor) -> bool:
    """Whether torch would turn this batch into nested sequences."""
    if not encoder.__dict__[_KEPT] or encoder.layers[0].training:
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled():
        return False
    if torch.compiler.is_compiling() or not torch.backends.mha.get_fastpath_enabled():
        return False
    if not getattr(encoder, "mask_check", True):
        return True
    return not bool((padding[:, :-1] & ~padding[:, 1:]).any())
