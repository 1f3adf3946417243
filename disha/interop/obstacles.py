"""Where PEFT's layers would not do in a model what its adapted layers do.

PEFT puts a layer of its own in place of each target, which adds to what the target returns. That
is without effect where the target is not called, or not by that name, and another sum where the
target's class goes on with what its base class returns. Whether a module of the user's reads the
weight of a layer instead of calling it does not show from outside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from disha.errors import ConversionError
from disha.layers import FOREIGN_KINDS, LAYER_KINDS, is_library_forward
from disha.model import ModelView

__all__ = ["PeftObstacles", "check_peft_acts", "class_of", "refuse"]

READ_IN_EVALUATION = ("linear1", "linear2")
"""The layers of an `nn.TransformerEncoderLayer` that its fused path reads."""


def check_peft_acts(view: ModelView, adapter: str) -> None:
    """Raise unless layers that PEFT puts in place of an adapter's would act as they do.

    Args:
        view: a model with the adapter.
        adapter: its name.

    Raises:
        ConversionError: some would not; the message says which and why.
        ArgumentError: there is no such adapter.
    """
    weights, obstacles = view.require(adapter), PeftObstacles(view)
    found = [
        f"{name or '(the model)'}: {why}"
        for name, _ in weights
        if (why := obstacles.to_export(name)) is not None
    ]
    refuse(found, "PEFT would not apply this adapter as it acts here")


def refuse(found: Sequence[str], what: str) -> None:
    """Raise if anything was found.

    Raises:
        ConversionError: with what was found.
    """
    if found:
        listing = "\n".join(found[:10]) + ("\n..." if len(found) > 10 else "")
        raise ConversionError(
            f"{what}, so nothing was written; leave these layers out (exclude=), or serve the "
            f"merged model (merge_adapters):\n{listing}"
        )


class PeftObstacles:
    """What keeps PEFT's layers from acting in a model, layer by layer.

    Args:
        view: the model.
    """

    def __init__(self, view: ModelView) -> None:
        self.by_name = view.modules
        self._aliases = view.names
        self._places = Counter(child for module in view.names for child in module._modules.values())
        self._read = _children(view, nn.MultiheadAttention, ("out_proj",))
        self._fused = _children(view, nn.TransformerEncoderLayer, READ_IN_EVALUATION)

    def to_export(self, name: str) -> str | None:
        """Return why an adapter's layer would not act alike in PEFT, or None if it would."""
        module = self.by_name.get(name)
        if module in self._fused:
            kind = self._fused[module].__name__
            return f"{kind} reads its weight in evaluation, without PEFT's update"
        return self.to_load(name)

    def to_load(self, name: str) -> str | None:
        """Return why PEFT's layer of that name does not act as ours would, or None if it does."""
        module = self.by_name.get(name)
        if module is None:
            return self._why_no_module(name)
        if not name:
            return (
                "PEFT adapts layers of a model, not the model itself, and this is the whole of it"
            )
        if module in self._read:
            return f"{self._read[module].__name__} reads its weight, without PEFT's update"
        if self._places[module] > 1:
            return (
                f"it is one module under the names {', '.join(self._aliases[module])}: in several "
                "places, of which PEFT adapts the first only"
            )
        if "parametrizations" in module._modules:
            return "its weight is computed (a parametrization), which PEFT can't merge into"
        if _has_own_forward(module):
            return (
                f"{class_of(module).__name__} has a forward of its own; PEFT adds to what that "
                "returns, or replaces it (BAT), and disha adds in the part of its base class"
            )
        return None

    def _why_no_module(self, name: str) -> str:
        above, _, last = name.rpartition(".")
        owner = self.by_name.get(above)
        if isinstance(owner, nn.MultiheadAttention):
            return (
                "it is a part of an nn.MultiheadAttention's packed weight, no module that PEFT "
                "could adapt"
            )
        if owner is not None and last in owner._parameters:
            return "it is a parameter, and PEFT's layers take the place of modules"
        return "the model has no such layer"


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module has without adapters."""
    cls: type[nn.Module] = getattr(type(module), "original_class", type(module))
    return cls


def _children(
    view: ModelView, owner: type[nn.Module], children: Sequence[str]
) -> Mapping[nn.Module | None, type[nn.Module]]:
    """Return these children of all modules of a class -> the class of their owner."""
    return {
        module._modules[child]: class_of(module)
        for module in view.names
        if isinstance(module, owner)
        for child in children
        if child in module._modules
    }


def _has_own_forward(module: nn.Module) -> bool:
    """Whether a class overrides the forward of the class whose weights are known."""
    cls: Any = class_of(module)
    for known in cls.__mro__:
        if known in LAYER_KINDS or (known.__module__, known.__qualname__) in FOREIGN_KINDS:
            return cls.forward is not known.forward and not is_library_forward(cls)
    return False
