"""The repeated layers of a model, which are checkpointed, compiled and sharded one at a time.

No module is wrapped, so names and state-dict keys stay the same.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from disha.finetune.errors import SettingsError
from disha.finetune.models.decoder import Decoder

__all__ = ["compile_model", "enable_gradient_checkpointing", "repeated_layers"]


OWN_WAYS = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
"""Methods of models of transformers, the newer name first. They take options for checkpointing."""


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """Return the stacked layers of a model, such as the layers of a decoder or the blocks of a net.

    A stack is a list of modules that are of one class and have parameters. A list inside a layer,
    such as its experts, is part of that layer.
    """
    if isinstance(model, Decoder):
        return list(model.model.layers)
    if _is_stack(model):
        return list(model.children())
    return [layer for child in model.children() for layer in repeated_layers(child)]


def _is_stack(module: nn.Module) -> bool:
    members = list(module.children())
    return (
        isinstance(module, (nn.ModuleList, nn.Sequential))
        and len(members) > 1
        and len({type(member) for member in members}) == 1
        and all(any(True for _ in member.parameters()) for member in members)
    )


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Keep only the inputs of layers, and compute the rest again in backward.

    If the model has its own method for this, as transformers models do, it is called. Otherwise the
    forward of every repeated layer is replaced in training mode. Dropout is the same both times.

    Raises:
        SettingsError: the model has no repeated layers, or does not support checkpointing.
    """
    own_way = next((getattr(model, name) for name in OWN_WAYS if hasattr(model, name)), None)
    if own_way is not None:
        try:
            own_way({"use_reentrant": False})
        except ValueError as error:
            raise SettingsError(f"--gradient_checkpointing: {error}; leave it out") from error
        return
    layers = repeated_layers(model)
    if not layers:
        raise SettingsError(
            f"--gradient_checkpointing needs a model with a list of layers of one class, and "
            f"{type(model).__name__} has none; leave it out"
        )
    for layer in layers:
        layer.forward = functools.partial(_checkpointed, layer)


def _checkpointed(layer: nn.Module, *inputs: Any, **named: Any) -> Any:
    # Take the method from the class. In a copy of the layer, a bound method would be that of the
    # original.
    forward = functools.partial(type(layer).forward, layer)
    if not layer.training:
        return forward(*inputs, **named)
    return checkpoint(forward, *inputs, use_reentrant=False, **named)


def compile_model(model: nn.Module) -> None:
    """Compile the repeated layers of a model in place, or the whole model if it has none.

    The layers share their code, which is compiled once for all of them. Call it after
    `enable_gradient_checkpointing`, and before the model is distributed.
    """
    for module in repeated_layers(model) or [model]:
        module.compile(dynamic=True if isinstance(model, Decoder) else None)
