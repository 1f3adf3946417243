"""The methods. Each adapts a model with as many trained parameters as Bone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from peft import (
    GraloraConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    ShiraConfig,
    inject_adapter_in_model,
)
from peft.tuners.gralora import GraloraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import disha
from benchmarks.convergence.groups import GROUPS
from benchmarks.convergence.runs import Cell

LARGEST_DIFFERENCE = 0.03
"""The largest relative difference from Bone's number of parameters."""

Layers = Mapping[str, nn.Module]
Adapt = Callable[[nn.Module, Layers, Cell], None]


class Method(NamedTuple):
    """A way to adapt linear layers in place. The page of results has the settings."""

    name: str
    title: str
    adapt: Adapt


def adapt(model: nn.Module, targets: str, head: str | None, cell: Cell) -> list[str]:
    """Adapt a model in place; only the adapter and the head train then."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.search(targets, name)
    }
    METHODS[cell.method].adapt(model, layers, cell)
    if head is not None:
        model.get_submodule(head).requires_grad_(True)
    for parameter in adapter_parameters(model, head):
        parameter.data = parameter.data.to(getattr(torch, cell.dtype))
    if cell.method != FULL:
        _check_count(model, head, layers, cell)
    return list(layers)


def adapter_parameters(model: nn.Module, head: str | None) -> list[nn.Parameter]:
    """Return the trained parameters, without the head's."""
    of_head = set() if head is None else set(model.get_submodule(head).parameters())
    return [p for p in model.parameters() if p.requires_grad and p not in of_head]


def budget(layers: Layers, r: int) -> int:
    """Return how many parameters Bone has on these layers: the sum of r x out."""
    return sum(r * _sizes(layer)[1] for layer in layers.values())


def set_scale(model: nn.Module, scale: float) -> None:
    """Multiply every adapter's update by a scale: 1 as trained, 0 for none.

    DoRA keeps its trained magnitudes at any scale, so that it is not the base at 0.
    """
    of_peft = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not of_peft:
        disha.set_adapter_scale(model, scale)
    for layer in of_peft:
        if isinstance(layer, GraloraLayer):  # it has no set_scale, and its scale is 1
            layer.scaling["default"] = scale
        else:
            layer.set_scale("default", scale)


def _check_count(model: nn.Module, head: str | None, layers: Layers, cell: Cell) -> None:
    count = sum(p.numel() for p in adapter_parameters(model, head))
    wanted = budget(layers, cell.r)
    if abs(count / wanted - 1) > LARGEST_DIFFERENCE:
        raise ValueError(f"{cell.title} has {count:,} parameters where Bone has {wanted:,}")


def _sizes(layer: nn.Module) -> tuple[int, int]:
    inner: Any = getattr(layer, "base_layer", layer)  # as peft wraps it
    return inner.in_features, inner.out_features


# --- ours ----------------------------------------------------------------------------------------


def _ours(model: nn.Module, layers: Layers, cell: Cell) -> None:
    disha.inject_adapters(model, lambda name, _: name in layers, cell.r, method=cell.method)


def _grouped(model: nn.Module, layers: Layers, cell: Cell) -> None:
    _, method = GROUPS[cell.method]
    disha.register_method(method)
    disha.inject_adapters(model, lambda name, _: name in layers, cell.r, method=method.name)


def _tile(model: nn.Module, layers: Layers, cell: Cell) -> None:
    assert cell.r_out is not None
    r = tile_r(layers, cell.r, cell.r_out)
    disha.inject_adapters(model, lambda name, _: name in layers, r, r_out=cell.r_out)


def tile_r(layers: Layers, r: int, r_out: int) -> int:
    """Return the r of a tile (r, r_out) that has as many parameters as Bone."""
    return round(budget(layers, r) / (r_out * len(layers)))


def _full(model: nn.Module, layers: Layers, cell: Cell) -> None:
    for layer in layers.values():
        layer.weight.requires_grad_(True)


# --- peft's --------------------------------------------------------------------------------------


def ranks(layers: Layers, wanted: int, factors: int = 1, beside: bool = False) -> dict[str, int]:
    """Return layer -> rank, as equal as the number of parameters allows."""
    costs = {name: factors * sum(_sizes(layer)) for name, layer in layers.items()}
    if beside:
        wanted -= sum(_sizes(layer)[1] for layer in layers.values())
    lowest = max(1, wanted // sum(costs.values()))
    chosen = dict.fromkeys(layers, lowest)
    left = wanted - lowest * sum(costs.values())
    for name, cost in costs.items():
        if cost <= left:
            chosen[name] += 1
            left -= cost
    return chosen


def _lora(**settings: Any) -> Adapt:
    def adapt(model: nn.Module, layers: Layers, cell: Cell) -> None:
        chosen = ranks(layers, budget(layers, cell.r), beside=settings.get("use_dora", False))
        common = _in_config(chosen)
        inject_adapter_in_model(LoraConfig(lora_alpha=common["r"], **common, **settings), model)

    return adapt


def _lora_identity(model: nn.Module, layers: Layers, cell: Cell) -> None:
    """LoRA that starts where Bone does: A = [I I ... I], B = 0. Unlike Bone, it trains A."""
    _lora()(model, layers, cell)
    for name in layers:
        a = model.get_submodule(name).lora_A["default"].weight
        rank, width = a.shape
        a.data = tiled(rank, width).contiguous()


def tiled(rank: int, width: int) -> Tensor:
    """Return [I I ... I], the matrix of Bone."""
    return torch.eye(rank).repeat(1, math.ceil(width / rank))[:, :width]


def _signs(rank: int, width: int) -> Tensor:
    return tiled(rank, width) * _random_signs(width)


def _golay(rank: int, width: int) -> Tensor:
    return tiled(rank, width) * torch.tensor([golay_sign(place) for place in range(width)])


def golay_sign(place: int) -> float:
    """Return a sign of the Golay-Rudin-Shapiro sequence, which is fixed and needs no seed.

    It is -1 where the binary digits of the place have an odd number of (overlapping) pairs 11.
    """
    return -1.0 if (place & (place >> 1)).bit_count() % 2 else 1.0


def _sketch(rank: int, width: int) -> Tensor:
    places = torch.randint(rank, (1, width))
    return torch.zeros(rank, width).scatter_(0, places, _random_signs(1, width))


def _random_signs(*shape: int) -> Tensor:
    return 2.0 * torch.randint(2, shape) - 1.0


def _rotations(rank: int, width: int) -> Tensor:
    shards = [nn.init.orthogonal_(torch.empty(rank, rank)) for _ in range(0, width, rank)]
    return torch.cat(shards, dim=1)[:, :width]


def _gaussian(rank: int, width: int) -> Tensor:
    return torch.randn(rank, width) / math.sqrt(rank)


MATRICES: Mapping[str, tuple[str, Callable[[int, int], Tensor]]] = {
    "signs": ("random signs", _signs),
    "sketch": ("count sketch", _sketch),
    "rotations": ("random rotations", _rotations),
    "gaussian": ("Gaussian", _gaussian),
}
"""Fixed matrices (rank, width) to put in the place of Bone's, each with its title.

As in Bone's, the columns have length 1; those of the Gaussian matrix have it on average. A count
sketch sends every input to a random place, with a random sign.
"""


def _fixed(matrix: Callable[[int, int], Tensor]) -> Adapt:
    """Return Bone with another matrix: A is drawn once and stays, B starts at zero and trains."""

    def adapt(model: nn.Module, layers: Layers, cell: Cell) -> None:
        config = LoraConfig(r=cell.r, lora_alpha=cell.r, target_modules=list(layers))
        inject_adapter_in_model(config, model)
        for name in layers:
            a = model.get_submodule(name).lora_A["default"].weight.requires_grad_(False)
            a.copy_(matrix(*a.shape))

    return adapt


def _shira(model: nn.Module, layers: Layers, cell: Cell) -> None:
    r = round(budget(layers, cell.r) / sum(map(sum, map(_sizes, layers.values()))))
    config = ShiraConfig(r=r, target_modules=list(layers), random_seed=torch.initial_seed())
    inject_adapter_in_model(config, model)


def _gralora(model: nn.Module, layers: Layers, cell: Cell) -> None:
    r = round(budget(layers, cell.r) / sum(map(sum, map(_sizes, layers.values()))))
    r -= r % 2  # it has two blocks, which share r
    config = GraloraConfig(r=r, alpha=r, gralora_k=2, target_modules=list(layers))
    inject_adapter_in_model(config, model)


def _oft(model: nn.Module, layers: Layers, cell: Cell) -> None:
    sizes = block_sizes({name: _sizes(layer)[0] for name, layer in layers.items()},
                        budget(layers, cell.r))  # fmt: skip
    for size in sorted(set(sizes.values())):  # a config has one size for all its layers
        names = [name for name in layers if sizes[name] == size]
        inject_adapter_in_model(OFTConfig(oft_block_size=size, target_modules=names), model)


def block_sizes(inputs: Mapping[str, int], wanted: int) -> dict[str, int]:
    """Return layer -> size of OFT's blocks, which divides its inputs, as equal as that allows.

    A block of size b has b (b - 1) / 2 parameters, and a layer has inputs / b blocks.
    """
    most = 1 + 2 * wanted / sum(inputs.values())
    divisors = {
        name: [size for size in range(2, count + 1) if count % size == 0]
        for name, count in inputs.items()
    }
    chosen = {name: max(size for size in divisors[name] if size <= most) for name in inputs}
    left = wanted - sum(inputs[name] * (size - 1) / 2 for name, size in chosen.items())
    for name, size in chosen.items():
        larger = min((one for one in divisors[name] if one > size), default=size)
        cost = inputs[name] * (larger - size) / 2
        if cost <= left:
            chosen[name] = larger
            left -= cost
    return chosen


def _loha(model: nn.Module, layers: Layers, cell: Cell) -> None:
    common = _in_config(ranks(layers, budget(layers, cell.r), factors=2))
    inject_adapter_in_model(LoHaConfig(alpha=common["r"], **common), model)


def _in_config(chosen: Mapping[str, int]) -> dict[str, Any]:
    """Return the ranks as peft takes them, with alpha = rank in every layer."""
    lowest = min(chosen.values())
    others = {f"^{re.escape(name)}$": r for name, r in chosen.items() if r != lowest}
    patterns = {"rank_pattern": others, "alpha_pattern": others}
    return {"r": lowest, **patterns, "target_modules": list(chosen)}


FULL, IDENTITY, SHIRA, GOLAY = "full", "lora_identity", "shira", "golay"
GRALORA, OFT = "gralora", "oft"

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("bone", "MiSS", _ours),
        Method("tile", "tile", _tile),
        Method("bat", "BAT", _ours),
        Method("lora", "LoRA", _lora()),
        Method("rslora", "rsLoRA", _lora(use_rslora=True)),
        Method("pissa", "PiSSA", _lora(init_lora_weights="pissa")),
        Method("olora", "OLoRA", _lora(init_lora_weights="olora")),
        Method("dora", "DoRA", _lora(use_dora=True)),
        Method(IDENTITY, "LoRA from identity", _lora_identity),
        Method(SHIRA, "SHiRA", _shira),
        *(
            Method(name, f"MiSS, {title}", _fixed(matrix))
            for name, (title, matrix) in MATRICES.items()
        ),
        Method(GOLAY, "MiSS, fixed signs", _fixed(_golay)),
        *(Method(name, title, _grouped) for name, (title, _) in GROUPS.items()),
        Method(GRALORA, "GraLoRA", _gralora),
        Method(OFT, "OFT", _oft),
        Method("loha", "LoHa", _loha),
        Method(FULL, "full fine-tuning", _full),
    )
}
