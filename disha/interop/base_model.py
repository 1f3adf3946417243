"""The original weights of a model's adapted layers."""

from __future__ import annotations

from torch import Tensor

from disha.interop.low_rank import BaseWeight
from disha.model import ModelView
from disha.sharding import whole

__all__ = ["base_weights"]


def base_weights(view: ModelView, adapter: str) -> BaseWeight:
    """Return what gives the original weights of an adapter's layers; collective if sharded."""
    weights = dict(view.require(adapter))

    def base_weight(name: str) -> Tensor:
        return whole(weights[name].base.detach())

    return base_weight
