"""Merge adapters into the weights, and restore the original weights bit for bit.

Only these functions merge; `eval()` and a forward never do. The original weight is kept while the
merged one is in use, so unmerging is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from disha import running_statistics
from disha.errors import ArgumentError, ArgumentTypeError, MergeError
from disha.functional import without_autocast
from disha.inject import check_removable, take_out
from disha.layers import (
    ROUNDED,
    AdaptedLayer,
    Merged,
    Original,
    Quantisation,
    Slot,
    is_library_forward,
    merged_weight,
    offloading_hooks,
    quantisation_of,
    stored_weight,
    takes_dense,
)
from disha.model import ModelView, all_or_nothing, join

__all__ = ["merge", "merge_adapters", "unmerge", "unmerge_adapters"]


def merge_adapters(
    model: nn.Module,
    adapter: str | Sequence[str] | None = None,
    *,
    untie: bool = False,
    dense: bool = False,
    unload: bool = False,
) -> None:
    """Add adapters to the weights: W becomes W + sum of s * dW, with each dW from the original W.

    The sum is computed in float32 (float64 for float64 weights) and rounded once. While adapters
    are merged, layers are as fast as plain ones, no other adapter acts, and `state_dict()` has the
    merged weights. Operations that would mix merged and unmerged adapters raise.

    Args:
        model: the complete model. If a weight is shared with a module outside of it, this is not
            noticed.
        adapter: the adapter, or several, to merge; the active ones by default.
        untie: if a weight is shared with another module (such as an output head tied to an
            embedding), give the adapted layer its own merged weight instead of raising.
            `unmerge_adapters` shares it again.
        dense: if a weight is quantised, let its layer compute with a dense merged weight,
            W dequantised + sum of s * dW, instead of raising. The layer is then a plain linear
            layer, in memory and in `state_dict()`. The weight has the dtype in which the layer
            computes. For a 4-bit layer of bitsandbytes, this is its compute dtype; if none was
            given and the layer has not run yet, it is the dtype before quantising. For an 8-bit
            layer of bitsandbytes it is float32, and for torchao the tensor's dtype.
            `unmerge_adapters` restores the quantised parameter itself.
        unload: leave a plain model. No copy of W is kept, all adapters are removed, and every
            module has its own class and state-dict keys again; a layer of bitsandbytes that got a
            dense weight becomes an `nn.Linear`. This can't be undone.

    Raises:
        ArgumentError: there is no such adapter, or no adapter is active.
        MergeError: adapters are already merged; a merged weight would not be finite; a weight is
            shared, computed or quantised; or the model is sharded (`fully_shard`).

    The model is unchanged whenever this raises.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Linear(8, 4), "all-linear", r=4, init="kaiming")
        >>> x = torch.randn(2, 8)
        >>> before, weight = model(x), model.base_weight.clone()
        >>> disha.merge_adapters(model)
        >>> torch.allclose(model(x), before, atol=1e-5)
        True
        >>> disha.unmerge_adapters(model)
        >>> torch.equal(model.base_weight, weight)
        True
        >>> disha.merge_adapters(model, unload=True)
        >>> type(model).__name__, list(model.state_dict())
        ('Linear', ['weight', 'bias'])
    """
    view = ModelView(model)
    if unload:
        view.refuse_wrapped("unload adapters", "unload them from the model inside")
        check_removable(view, view.adapters)
    with all_or_nothing(view) as undo:
        merge(view, undo, adapter, untie=untie, dense=dense)
        if unload:
            layers = [layer for _, layer in view.layers if _is_dense(layer)]
            take_out(view, view.adapters, undo)
            running_statistics.forget(view, undo)
            for layer in layers:
                _compute_densely(layer, undo)


def _is_dense(layer: AdaptedLayer) -> bool:
    """Whether a dense weight replaces a quantised one of a merged layer."""
    merged = layer.disha.merged
    return merged is not None and any(one.dense for one in merged.originals.values())


def _compute_densely(layer: nn.Module, undo: ExitStack) -> None:
    """Make a layer of bitsandbytes that has a dense weight an `nn.Linear`."""
    if is_library_forward(type(layer)):
        undo.callback(object.__setattr__, layer, "__class__", type(layer))
        object.__setattr__(layer, "__class__", nn.Linear)
        weight, bias = layer._parameters["weight"], layer._parameters["bias"]
        if bias is not None and weight is not None:
            _replace(layer, "bias", nn.Parameter(bias.to(weight.dtype), bias.requires_grad), undo)


def merge(
    view: ModelView,
    undo: ExitStack,
    adapter: str | Sequence[str] | None = None,
    *,
    untie: bool = False,
    dense: bool = False,
) -> None:
    """Do as `merge_adapters`, and note in `undo` how to take it back."""
    view.refuse_inside("merge adapters")
    _refuse_sharded(view, "merge adapters")
    # Inference mode is off, because tensors that are made in it can never be trained.
    with torch.inference_mode(False), torch.no_grad():
        chosen = _chosen(view, adapter)
        weights = [
            (join(name, slot.parameter), layer, slot)
            for name, layer in view.layers
            for slot in _changed_slots(layer, chosen[layer])
        ]
        shared = [_check_mergeable(view, *weight, untie=untie, dense=dense) for weight in weights]
        merged = [
            _merged(name, layer, slot, chosen[layer], is_shared)
            for (name, layer, slot), is_shared in zip(weights, shared, strict=True)
        ]
        originals: dict[AdaptedLayer, dict[str, Original]] = {layer: {} for layer in chosen}
        for (_, layer, slot), (original, new) in zip(weights, merged, strict=True):
            originals[layer][slot.parameter] = original
            _replace(layer, slot.parameter, new, undo)
        for layer, names in chosen.items():
            _note_merged(layer, Merged(names, originals[layer]), undo)


def _replace(module: nn.Module, name: str, new: Tensor, undo: ExitStack) -> None:
    """Replace a parameter, or only its data if `new` is none, which takes one copy less."""
    now = module._parameters[name]
    assert now is not None
    if isinstance(new, nn.Parameter):
        undo.callback(module._parameters.__setitem__, name, now)
        module._parameters[name] = new
    else:
        undo.callback(setattr, now, "data", now.data)
        now.data = new


def _note_merged(layer: AdaptedLayer, merged: Merged | None, undo: ExitStack) -> None:
    undo.callback(setattr, layer.disha, "merged", layer.disha.merged)
    layer.disha.merged = merged


def unmerge_adapters(model: nn.Module) -> None:
    """Restore the original weights, bit for bit. The adapters act again.

    If no adapter is merged, this does nothing.

    Args:
        model: a model with adapters.

    Raises:
        MergeError: the model was sharded after adapters were merged, or offloaded (accelerate).

    Examples:
        >>> import torch
        >>> import disha
        >>> layer = disha.BatLinear(8, 4, r=4, init="kaiming")
        >>> original = layer.base_weight.clone()
        >>> disha.merge_adapters(layer)
        >>> torch.equal(layer.weight, original)
        False
        >>> disha.unmerge_adapters(layer)
        >>> torch.equal(layer.base_weight, original)
        True
    """
    view = ModelView(model)
    with all_or_nothing(view) as undo:
        unmerge(view, undo)


def unmerge(view: ModelView, undo: ExitStack) -> None:
    """Do as `unmerge_adapters`, and note in `undo` how to take it back."""
    layers = [layer for _, layer in view.layers]
    if any(layer.disha.merged is not None for layer in layers):
        _refuse_sharded(view, "unmerge adapters")
    for layer in layers:
        _refuse_offloaded(layer)
    restored = [
        (layer, name, _restored(layer, name, original))
        for layer in layers
        if layer.disha.merged is not None
        for name, original in layer.disha.merged.originals.items()
    ]
    for layer, name, former in restored:
        _replace(layer, name, former, undo)
    for layer in layers:
        _note_merged(layer, None, undo)


def _refuse_offloaded(layer: AdaptedLayer) -> None:
    """Raise if accelerate has offloaded the merged weight, and loads it for each forward."""
    merged = layer.disha.merged if offloading_hooks(layer) else None
    for name, original in () if merged is None else merged.originals.items():
        now = layer._parameters[name]
        before = original.data if original.parameter is None else original.parameter
        if now is not None and before is not None and now.is_meta and not before.is_meta:
            raise MergeError(
                f"can't unmerge adapters: the merged {name} of a {layer.original_class.__name__} "
                "is offloaded, and its hook would load it again; remove the hooks first "
                "(accelerate.hooks.remove_hook_from_submodules)"
            )


def _changed_slots(layer: AdaptedLayer, adapters: tuple[str, ...]) -> list[Slot]:
    """Return one slot for each parameter that the adapters change."""
    found: dict[str, Slot] = {}
    for (adapter, _), block in layer.disha.blocks().items():
        if adapter in adapters:
            found.setdefault(block.slot.parameter, block.slot)
    return list(found.values())


def _refuse_sharded(view: ModelView, action: str) -> None:
    module = view.sharded
    if module is not None:
        raise MergeError(
            f"can't {action} in a model with sharded parameters ({type(module).__name__}): each "
            "rank has only a part of every weight. Save the adapter (save_adapter, on all ranks), "
            "load it into the plain model, and merge there"
        )


def _chosen(
    view: ModelView, adapter: str | Sequence[str] | None
) -> dict[AdaptedLayer, tuple[str, ...]]:
    """Return each layer -> those of its adapters to merge."""
    if adapter is None:
        wanted = {layer: layer.disha.active for _, layer in view.layers}
    else:
        if not isinstance(adapter, Sequence):
            raise ArgumentTypeError(
                f"adapter must be a name or a list of names, got {adapter!r} of type "
                f"{type(adapter).__name__}"
            )
        names = (adapter,) if isinstance(adapter, str) else tuple(adapter)
        for name in names:
            view.require(name)
        if len(set(names)) != len(names):
            raise ArgumentError(f"an adapter can be merged only once, got {list(names)}")
        wanted = {layer: names for _, layer in view.layers}
    present = {
        layer: tuple(name for name in names if name in layer.disha)
        for layer, names in wanted.items()
    }
    if not any(present.values()):
        raise ArgumentError(
            "there is nothing to merge: no adapter is active. Inject or load one, or pass adapter="
        )
    return present


def _check_mergeable(
    view: ModelView, name: str, layer: AdaptedLayer, slot: Slot, *, untie: bool, dense: bool
) -> bool:
    """Raise if nothing can be merged into a weight; return whether other modules share it."""
    parameter = layer._parameters.get(slot.parameter)
    quantisation = quantisation_of(layer, stored_weight(layer, slot.parameter))
    if parameter is None and quantisation is None:
        raise MergeError(
            f"{name} is computed from other parameters (a parametrization), so nothing can be "
            "merged into it. Save the adapter, remove it and the parametrization "
            "(torch.nn.utils.parametrize.remove_parametrizations), and load it again"
        )
    blocks = [block.block for block in layer.disha.blocks().values()]
    if any(tensor is not None and tensor.is_meta for tensor in (parameter, *blocks)):
        raise MergeError(
            f"{name} or its adapter is on the meta device; give the model its weights first"
        )
    known = view.parameters_by_name.get(name)
    own = {join(alias, slot.parameter) for alias in view.names[layer]}
    others = [] if known is None else [other for other in known.names if other not in own]
    if others and not untie:
        raise MergeError(
            f"{name} is shared with {', '.join(others)}, which merging would change too; pass "
            "untie=True to give this layer a weight of its own while merged"
        )
    if quantisation is not None:
        reason = _reason_against_quantised(layer, parameter, quantisation, dense)
        if reason is not None:
            raise MergeError(f"{name} is quantised ({quantisation.name}), {reason}")
    return bool(others)


def _reason_against_quantised(
    layer: AdaptedLayer, parameter: Tensor | None, quantisation: Quantisation, dense: bool
) -> str | None:
    """Return why nothing can be merged into a quantised weight and what to do, or None."""
    unmerged = "leave its adapters unmerged"
    if quantisation.read is None:
        return f"and can't be read as numbers; {unmerged}"
    if quantisation is ROUNDED:
        return f"and its layer would not compute the same with a merged weight; {unmerged}"
    if not dense:
        return (
            "so its values are too coarse for an update; pass dense=True to compute with "
            f"a dense merged weight until unmerge_adapters, or {unmerged}"
        )
    if parameter is None or not takes_dense(layer):
        return (
            f"and its layer is a {layer.original_class.__name__} with a forward of its own, which "
            f"can't compute with a dense weight; {unmerged}"
        )
    return None


def _merged(
    name: str, layer: AdaptedLayer, slot: Slot, adapters: tuple[str, ...], shared: bool
) -> tuple[Original, Tensor]:
    """Return the original of a weight, and what replaces it."""
    parameter = layer._parameters[slot.parameter]
    assert parameter is not None
    with without_autocast(parameter.device):
        merged = merged_weight(layer, slot, adapters)
    # isfinite lacks some dtypes of 8 bits.
    if not torch.isfinite(merged.float() if merged.itemsize == 1 else merged).all():
        raise MergeError(
            f"merging {', '.join(map(repr, adapters))} into {name} gives values that are not "
            "finite; check the adapter's blocks and its scale"
        )
    if quantisation_of(layer, stored_weight(layer, slot.parameter)) is not None:
        original = Original(parameter=parameter, dense=True)
    else:
        original = Original(parameter.data, parameter if shared else None)
    if original.parameter is not None:
        merged = nn.Parameter(merged, requires_grad=parameter.requires_grad)
    return original, merged


def _restored(layer: AdaptedLayer, name: str, original: Original) -> Tensor:
    """Return what replaces a merged weight."""
    now = layer._parameters[name]
    assert now is not None
    if original.parameter is not None:
        return _moved(original.parameter, now.device) if original.dense else original.parameter
    assert original.data is not None
    # The weight may have moved since, so the original moves to its device and dtype.
    return original.data.to(device=now.device, dtype=now.dtype)


def _moved(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    """Return a quantised parameter on a device: itself, if it is already there."""
    if parameter.device == device:
        return parameter
    moved = parameter.to(device)  # a parameter, if its class defines `to`
    return moved if isinstance(moved, nn.Parameter) else nn.Parameter(moved, requires_grad=False)
