"""The methods. Each adapts a model with as many trained parameters as Bone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import LoHaConfig, LoraConfig, ShiraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import disha
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
        parameter.data = parameter.data.float()
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


def _ours(model: nn.Module, layers: Layers, cell: Cell, **more: Any) -> None:
    disha.inject_adapters(model, lambda name, _: name in layers, cell.r, **more)


def _tile(model: nn.Module, layers: Layers, cell: Cell) -> None:
    assert cell.r_out is not None
    r = round(budget(layers, cell.r) / (cell.r_out * len(layers)))
    disha.inject_adapters(model, lambda name, _: name in layers, r, r_out=cell.r_out)


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


def _shira(model: nn.Module, layers: Layers, cell: Cell) -> None:
    r = round(budget(layers, cell.r) / sum(map(sum, map(_sizes, layers.values()))))
    config = ShiraConfig(r=r, target_modules=list(layers), random_seed=torch.initial_seed())
    inject_adapter_in_model(config, model)


def _loha(model: nn.Module, layers: Layers, cell: Cell) -> None:
    common = _in_config(ranks(layers, budget(layers, cell.r), factors=2))
    inject_adapter_in_model(LoHaConfig(alpha=common["r"], **common), model)


def _in_config(chosen: Mapping[str, int]) -> dict[str, Any]:
    """Return the ranks as peft takes them, with alpha = rank in every layer."""
    lowest = min(chosen.values())
    others = {f"^{re.escape(name)}$": r for name, r in chosen.items() if r != lowest}
    patterns = {"rank_pattern": others, "alpha_pattern": others}
    return {"r": lowest, **patterns, "target_modules": list(chosen)}


FULL, SHIRA = "full", "shira"

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("bone", "MiSS", _ours),
        Method("tile", "tile", _tile),
        Method("bat", "BAT", partial(_ours, method="bat")),
        Method("lora", "LoRA", _lora()),
        Method("rslora", "rsLoRA", _lora(use_rslora=True)),
        Method("pissa", "PiSSA", _lora(init_lora_weights="pissa")),
        Method("olora", "OLoRA", _lora(init_lora_weights="olora")),
        Method("dora", "DoRA", _lora(use_dora=True)),
        Method(SHIRA, "SHiRA", _shira),
        Method("groups2", "MiSS, 2 groups", partial(_ours, groups=2)),
        Method("groups3", "MiSS, 3 groups", partial(_ours, groups=3)),
        Method("groups4", "MiSS, 4 groups", partial(_ours, groups=4)),
        Method("groups_all", "MiSS, n groups", partial(_ours, groups="all")),
        Method("loha", "LoHa", _loha),
        Method(FULL, "full fine-tuning", _full),
    )
}
