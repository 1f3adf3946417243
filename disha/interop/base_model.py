"""The original weights of a model's adapted layers."""

from __future__ import annotations

from torch import Tensor, nn

from disha.interop.low_rank import BaseWeight
from disha.sharding import whole
from disha.tree import require_adapter

__all__ = ["base_weights"]


def base_weights(model: nn.Module, adapter: str) -> BaseWeight:
    """Return what gives the original weights of an adapter's layers; collective if sharded."""
    weights = dict(require_adapter(model, adapter))

    def base_weight(name: str) -> Tensor:
        return whole(weights[name].base.detach())

    return base_weight
