"""Putting the adapter that settings describe into a model, planning to, and doing without it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import disha
from disha.finetune.models.decoder import Decoder
from disha.finetune.settings import AdapterSettings
from disha.finetune.settings.adapter import ALL_PROJECTIONS

__all__ = ["base_values", "inject", "plan", "trained_besides", "without_adapter"]


def inject(model: nn.Module, settings: AdapterSettings) -> None:
    """Inject the adapter; blocks are float32 whatever the model is kept in.

    Raises:
        DishaError: the target matches no layer, or a layer can't be adapted so.
    """
    disha.inject_adapters(model, **_arguments(model, settings))


def plan(model: nn.Module, settings: AdapterSettings) -> disha.Plan:
    """Return what `inject` would do.

    Raises:
        DishaError: the target matches no layer, or a layer can't be adapted so.
    """
    return disha.plan_adapters(model, **_arguments(model, settings))


def trained_besides(model: nn.Module) -> list[str]:
    """The names of the parameters that are trained beside the adapter's own."""
    own = set(map(id, disha.adapter_parameters(model)))
    named = model.named_parameters()
    return [name for name, p in named if p.requires_grad and id(p) not in own]


def base_values(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Copy parameters of the base model, before training or loading replaces their values."""
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach().clone() for name in names}


@contextmanager
def without_adapter(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a model be the base model meanwhile.

    Args:
        model: with an adapter, not merged.
        values: what `base_values` returned of the parameters that are trained beside it.
    """
    adapted = base_values(model, values)
    _set_values(model, values)
    try:
        with disha.adapters_disabled(model):
            yield
    finally:
        _set_values(model, adapted)


def _set_values(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def _arguments(model: nn.Module, settings: AdapterSettings) -> dict[str, Any]:
    usual = ALL_PROJECTIONS if isinstance(model, Decoder) else "all-linear"
    return {
        "target_regex": settings.target or usual,
        "r": settings.bone_r,
        "r_out": settings.bone_r_out,
        "method": settings.kind,
        "also_train": settings.also_train,
        "dropout": settings.adapter_dropout,
        "dtype": torch.float32,
    }
