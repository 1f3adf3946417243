"""Which number of a block is added to which cell of dW, according to an adapted layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

import disha

Index = tuple[int, ...]


@dataclass(frozen=True)
class Landing:
    """Where the numbers of a block are added.

    Attributes:
        block: shape of the block.
        weight: shape of the weight, and of dW.
        origin: cell of dW -> the number of the block that is added there, if any.
    """

    block: Index
    weight: Index
    origin: dict[Index, Index]

    def cells_of(self, number: Index) -> list[Index]:
        """Return the cells to which a number of the block is added."""
        return [cell for cell, origin in self.origin.items() if origin == number]


@dataclass(frozen=True)
class Reach:
    """What one cell of BAT's dW depends on: numbers of the block, and cells of the weight."""

    block: list[Index]
    weight: list[Index]


def landing(layer: nn.Module, r: int, method: str = "bone", r_out: int | None = None) -> Landing:
    """Adapt a layer, put distinct numbers into its block, and find them in its dW.

    BAT adds its block and also multiplies it by the weight. With a weight of zeros, only the
    addition is visible.
    """
    adapted, numbers = _adapted(layer, r, method, r_out)
    _weight(adapted).data.zero_()
    delta = adapted.delta_weight(adapted.disha["default"]).detach()
    places = {int(numbers[index]): index for index in _indices(numbers)}
    origin = {cell: places[round(float(delta[cell]))] for cell in _indices(delta) if delta[cell]}
    return Landing(tuple(numbers.shape), tuple(delta.shape), origin)


def reach(layer: nn.Module, r: int, cell: Index) -> Reach:
    """Return what a cell of a layer's dW with BAT depends on, found by gradients."""
    adapted, _ = _adapted(layer, r, "bat", None)
    weight = _weight(adapted)
    weight.data = torch.arange(1.0, 1 + weight.numel(), dtype=torch.float64).view(weight.shape)
    weight.requires_grad_()
    block = adapted.disha["default"]
    grads = torch.autograd.grad(adapted.delta_weight(block)[cell], (block.block, weight))
    return Reach(*([index for index in _indices(grad) if grad[index] != 0] for grad in grads))


def _adapted(
    layer: nn.Module, r: int, method: str, r_out: int | None
) -> tuple[disha.AdaptedLayer, Tensor]:
    """Return the adapted layer, and its block, which holds 1, 2, 3, ..."""
    disha.inject_adapters(layer.double(), lambda *_: True, r, method=method, r_out=r_out)
    adapted = cast(disha.AdaptedLayer, layer)
    block = adapted.disha["default"].block
    block.data = torch.arange(1.0, 1 + block.numel(), dtype=torch.float64).view(block.shape)
    return adapted, block.detach()


def _weight(layer: disha.AdaptedLayer) -> nn.Parameter:
    return cast(nn.Parameter, layer.base_weight)


def _indices(tensor: Tensor) -> list[Index]:
    return [tuple(map(int, index)) for index in torch.ones(tensor.shape).nonzero()]
