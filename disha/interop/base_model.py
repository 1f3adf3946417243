"""What a model tells of an adapter's layers, and the adapter away from it does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from disha.files import AdapterHeader
from disha.interop.low_rank import BaseWeight
from disha.sharding import whole
from disha.tree import module_names, require_adapter

__all__ = ["base_weights", "padding_rows", "with_layouts"]


def base_weights(model: nn.Module, adapter: str) -> BaseWeight:
    """Return what gives the original weights of an adapter's layers; collective if sharded."""
    layers = dict(require_adapter(model, adapter))

    def base_weight(name: str) -> Tensor:
        return whole(layers[name].base_weight.detach())

    return base_weight


def padding_rows(model: nn.Module) -> dict[str, int]:
    """Return embedding -> the row that its update leaves out, where there is one."""
    return {
        name: module.padding_idx
        for module, names in module_names(model).items()
        if isinstance(module, nn.Embedding) and module.padding_idx is not None
        for name in names
    }


def with_layouts(header: AdapterHeader, padding: Mapping[str, int]) -> AdapterHeader:
    """Return the header with the layouts that it lacks for want of the padding row."""
    layers = tuple(
        replace(layer, layout="embedding") if layer.name in padding else layer
        for layer in header.layers
    )
    return replace(header, layers=layers)
