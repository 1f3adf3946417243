"""Activate, disable, scale: how adapters act at run time. Nothing here touches requires_grad."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from disha.config import check_scale
from disha.errors import ArgumentError, ArgumentTypeError
from disha.layers.adapted import refuse_merged
from disha.tree import adapted_layers, require_adapter

__all__ = ["adapters_disabled", "set_active_adapters", "set_adapter_scale"]


def set_active_adapters(model: nn.Module, names: str | Sequence[str]) -> None:
    """Let exactly these adapters act; several add up, each computed from the original weight.

    Args:
        model: a model with adapters.
        names: one name or several; an empty list for none.

    Raises:
        ArgumentError: a name is unknown, or given twice.
        ArgumentTypeError: `names` is neither a str nor a sequence of them.
        MergeError: adapters are merged.

    Example:
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Linear(8, 16), "all-linear", r=4, adapter="a")
        >>> model = disha.inject_adapters(model, "all-linear", r=2, adapter="b")
        >>> model.disha.active
        ('b',)
        >>> disha.set_active_adapters(model, ["a", "b"])
        >>> model.disha.active
        ('a', 'b')
    """
    wanted = (names,) if isinstance(names, str) else names
    if not isinstance(wanted, Sequence) or not all(isinstance(name, str) for name in wanted):
        raise ArgumentTypeError(
            f"names must be an adapter's name or a list of names, got {names!r}"
        )
    if len(set(wanted)) != len(wanted):
        raise ArgumentError(f"names lists an adapter twice: {list(wanted)}")
    for name in wanted:
        require_adapter(model, name)
    layers = [layer for _, layer in adapted_layers(model)]
    refuse_merged(layers, "change the active adapters")
    for layer in layers:
        layer.disha.activate(tuple(wanted))


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Run the body with all adapters off: the model computes what its base does.

    Can be nested; the state before comes back also when the body raises.

    Args:
        model: a model with adapters.

    Raises:
        MergeError: adapters are merged, so that switching them off would not give the base.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import disha
        >>> model = nn.Linear(8, 4)
        >>> x = torch.randn(2, 8)
        >>> before = model(x)
        >>> model = disha.inject_adapters(model, "all-linear", r=4, init="kaiming")
        >>> with disha.adapters_disabled(model):
        ...     print(torch.equal(model(x), before))
        True
    """
    layers = [layer for _, layer in adapted_layers(model)]
    refuse_merged(layers, "disable adapters")
    before = [layer.disha.enabled for layer in layers]
    try:
        for layer in layers:
            layer.disha.set_enabled(False)
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.disha.set_enabled(enabled)


def set_adapter_scale(model: nn.Module, scale: float, adapter: str = "default") -> None:
    """Set the runtime scale s of an adapter: 0 switches it off, 1 is as trained, beyond is more.

    Args:
        model: a model with adapters.
        scale: a finite number.
        adapter: the adapter's name.

    Raises:
        ArgumentError: the scale is not finite, or there is no such adapter.
        ArgumentTypeError: the scale is no number.
        MergeError: adapters are merged.

    Example:
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Linear(8, 16), "all-linear", r=4)
        >>> disha.set_adapter_scale(model, 0.5)
        >>> model.disha["default"].strength
        0.5
    """
    check_scale(scale)
    layers = [layer for _, layer in require_adapter(model, adapter)]
    refuse_merged(layers, "change an adapter's scale")
    for layer in layers:
        layer.disha[adapter].set_strength(scale)
