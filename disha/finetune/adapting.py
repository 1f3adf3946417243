"""Adds an adapter to a model, from settings or from a file, and turns it off temporarily."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import disha
from disha.finetune.models.decoder import Decoder
from disha.finetune.settings import AdapterSettings

__all__ = [
    "ALL_PROJECTIONS",
    "base_values",
    "inject",
    "plan",
    "trained_besides",
    "with_adapter",
    "without_adapter",
]

ALL_PROJECTIONS = r"\.(q|k|v|o|gate|up|down)_proj$"
"""The names of the linear layers of a decoder layer."""


def inject(model: nn.Module, settings: AdapterSettings) -> None:
    """Inject the adapter, with float32 blocks.

    Raises:
        DishaError: the target matches no layer, or the settings don't fit a layer.
    """
    disha.inject_adapters(model, **_arguments(model, settings))


def plan(model: nn.Module, settings: AdapterSettings) -> disha.Plan:
    """Return what `inject` would do.

    Raises:
        DishaError: the target matches no layer, or the settings don't fit a layer.
    """
    return disha.plan_adapters(model, **_arguments(model, settings))


def _arguments(model: nn.Module, settings: AdapterSettings) -> dict[str, Any]:
    return {
        "target_regex": settings.target
        or (ALL_PROJECTIONS if isinstance(model, Decoder) else "all-linear"),
        "r": settings.bone_r,
        "r_out": settings.bone_r_out,
        "method": settings.method_name,
        "also_train": settings.also_train,
        "dropout": settings.adapter_dropout,
        "dtype": torch.float32,
    }


def with_adapter(
    model: nn.Module, adapter: Path | None, *, merge: bool = False
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the model in evaluation mode, with an adapter from a file.

    Returns:
        The model, and the base model's values of the parameters that the file replaces. Pass these
        values to `without_adapter`.

    Raises:
        DishaError: the file can't be used, or does not fit the model.
    """
    model.eval()
    if adapter is None:
        return model, {}
    known = dict(model.named_parameters())
    values = base_values(model, known.keys() & set(disha.inspect_adapter(adapter).also_train))
    disha.load_adapter(model, adapter)
    if merge:
        disha.merge_adapters(model, untie=True, dense=True)
    return model, values


def trained_besides(model: nn.Module) -> list[str]:
    """Return the names of the parameters that are trained beside the adapter's own."""
    own = set(map(id, disha.adapter_parameters(model)))
    named = model.named_parameters()
    return [name for name, p in named if p.requires_grad and id(p) not in own]


def base_values(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Copy parameters of the base model, before training or loading replaces their values."""
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach().clone() for name in names}


@contextmanager
def without_adapter(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Turn a model into the base model while the body runs.

    Args:
        model: the model, with an adapter that is not merged.
        values: the base model's values of the parameters that are trained beside the adapter.
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
