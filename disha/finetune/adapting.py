"""Adds an adapter to a model, from settings or from a file, and turns it off temporarily."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import disha
from disha.finetune.errors import SettingsError
from disha.finetune.models.decoder import Decoder
from disha.finetune.settings import AdapterSettings
from disha.text import counted

__all__ = [
    "ALL_PROJECTIONS",
    "arguments",
    "base_values",
    "inject",
    "plan",
    "refusing_other_base",
    "with_adapter",
    "without_adapter",
]

ALL_PROJECTIONS = r"\.(q|k|v|o|gate|up|down)_proj$"
"""The names of the linear layers of a decoder layer."""


def inject(
    model: nn.Module, settings: AdapterSettings, say: Callable[[str], None] = print
) -> dict[str, Tensor]:
    """Inject the adapter with float32 blocks, new or from the file that the settings name.

    Args:
        model: the base model.
        settings: the adapter.
        say: told which weights the default target leaves out.

    Returns:
        The base model's values of the parameters that are trained with the adapter.

    Raises:
        DishaError: the target matches no layer; or the settings, or the file, do not fit the
            model; or the adapter belongs to another base.
    """
    if settings.adapter is None:
        given = arguments(model, settings)
        unfit = len(given["exclude"]) - (settings.exclude is not None)
        if unfit:
            say(f"left out {counted(unfit, 'weight')} that r does not fit; --dry_run names them")
        disha.inject_adapters(model, **given)
        return base_values(model, _trained_besides(model))
    with refusing_other_base():
        return _loaded(model, settings.adapter, torch.float32)


@contextmanager
def refusing_other_base() -> Iterator[None]:
    """Raise `SettingsError` if the block loads an adapter that belongs to another base."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", disha.AdapterFileWarning)
            yield
    except disha.AdapterFileWarning as warning:
        raise SettingsError(str(warning)) from warning


def plan(model: nn.Module, settings: AdapterSettings) -> disha.Plan:
    """Return what `inject` would do.

    Raises:
        DishaError: the target matches no layer, or the settings don't fit a layer.
    """
    return disha.plan_adapters(model, **_asked(model, settings))


def arguments(model: nn.Module, settings: AdapterSettings) -> dict[str, Any]:
    """Return the arguments of `disha.inject_adapters` for an adapter with new blocks.

    If r fits only some of the weights, the default target leaves out the others. Some models have
    small matrices beside large ones, such as Mamba's for the length of a step.
    """
    asked = _asked(model, settings)
    if settings.target is not None or settings.adapter is not None or isinstance(model, Decoder):
        return asked
    found = disha.plan_adapters(model, **asked)
    unfit = [one.name for one in found.skipped if one.is_weight] if found.layers else []
    return {**asked, "exclude": [*asked["exclude"], *(f"^{re.escape(name)}$" for name in unfit)]}


def _asked(model: nn.Module, settings: AdapterSettings) -> dict[str, Any]:
    if settings.adapter is not None:
        return _arguments_of_file(settings.adapter)
    return {
        "target_regex": settings.target
        or (ALL_PROJECTIONS if isinstance(model, Decoder) else "all-linear"),
        "r": settings.bone_r,
        "r_out": settings.bone_r_out,
        "method": settings.method_name,
        "exclude": [] if settings.exclude is None else [settings.exclude],
        "rank_pattern": settings.ranks,
        "also_train": settings.also_train,
        "dropout": settings.adapter_dropout,
        "dtype": torch.float32,
    }


def _arguments_of_file(path: Path) -> dict[str, Any]:
    """Return arguments that name each layer of an adapter file."""
    described = disha.inspect_adapter(path)
    names = {f"^{re.escape(layer.name)}$": layer for layer in described.layers}
    return {
        "target_regex": "|".join(names),
        "r": described.config.r,
        "r_out": described.config.r_out,
        "rank_pattern": {name: layer.r for name, layer in names.items()},
        "rows": {name: layer.rows for name, layer in names.items() if layer.rows},
        "method": described.config.method,
        "also_train": [f"^{re.escape(name)}$" for name in described.also_train],
        "dropout": described.config.dropout,
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
    values = _loaded(model, adapter)
    if merge:
        disha.merge_adapters(model, untie=True, dense=True)
    return model, values


def _loaded(model: nn.Module, adapter: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Load an adapter, and return the base model's values of the parameters that it replaces."""
    known = dict(model.named_parameters())
    values = base_values(model, known.keys() & set(disha.inspect_adapter(adapter).also_train))
    disha.load_adapter(model, adapter, dtype=dtype)
    return values


def _trained_besides(model: nn.Module) -> list[str]:
    """Return the names of the parameters of the base model that are trained with the adapter."""
    named = model.named_parameters()
    return [name for name, p in named if p.requires_grad and ".disha." not in name]


def base_values(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Copy parameters of the base model, before training or loading replaces their values."""
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach().clone() for name in names}


@contextmanager
def without_adapter(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Turn a model into the base model inside the block.

    Args:
        model: the model, with an adapter that is not merged.
        values: the base model's values of the parameters that are trained with the adapter.
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
