"""Where PEFT's layers would not do in a model what its adapted layers do.

PEFT puts a layer of its own in place of each target, which adds to what the target returns. That
is without effect where the target is not called, or not by that name, and another sum where the
target's class goes on with what `nn.Linear` returns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from disha.errors import ConversionError
from disha.layers import AdaptedLayer
from disha.layers.attention import Owner, Projection
from disha.layers.fronts import ReadLayer
from disha.tree import ModuleNames, module_names, require_adapter

__all__ = ["check_peft_acts", "refuse"]

FUSED = ("linear1", "linear2")
"""The layers of an `nn.TransformerEncoderLayer` that its fused path reads in evaluation."""


def check_peft_acts(model: nn.Module, adapter: str) -> None:
    """Raise unless layers that PEFT puts in place of an adapter's would act as they do.

    Args:
        model: a model with the adapter.
        adapter: its name.

    Raises:
        ConversionError: some would not; the message says which and why.
        ArgumentError: there is no such adapter.
    """
    names = module_names(model)
    owners = [module for module in names if isinstance(module, Owner)]
    found = [
        f"{name or '(the model)'}: {why}"
        for name, layer in require_adapter(model, adapter)
        for why in _obstacles(name, layer, names, owners)
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


def _obstacles(
    name: str, layer: AdaptedLayer, names: ModuleNames, owners: Sequence[Owner]
) -> Iterator[str]:
    if not name:
        yield "PEFT replaces modules within a model, and this is the whole of it"
    if len(names[layer]) > 1:
        yield f"it is one module under the names {', '.join(names[layer])}; PEFT replaces the first"
    if isinstance(layer, Projection):
        yield "it is a part of an nn.MultiheadAttention's packed weight, no module of its own"
    elif isinstance(layer, ReadLayer):
        yield "what runs it reads its weight instead of calling it"
    elif (reader := _reader(name, layer, owners)) is not None:
        yield f"{reader.original_class.__name__} reads its weight instead of calling it"
    elif layer.own_forward and not layer.library_forward:
        yield f"{layer.original_class.__name__} has a forward of its own around that of its base"


def _reader(name: str, layer: AdaptedLayer, owners: Sequence[Owner]) -> Owner | None:
    """Return the module of torch that reads the weight of its own layer, at least at times."""
    for owner in owners:
        if layer in owner._modules.values() and (
            isinstance(owner, nn.MultiheadAttention) or name.endswith(FUSED)
        ):
            return owner
    return None
