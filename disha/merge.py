"""Merge adapters into the weights, and take them out again bit for bit.

Merging is explicit: never on eval(), never inside forward. The original weight is kept beside the
merged one, so that unmerging is exact whatever was merged, and how often.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import nn

from disha.errors import ArgumentError, ArgumentTypeError, MergeError
from disha.functional import without_autocast
from disha.layers import (
    ROUNDED,
    AdaptedLayer,
    AdaptedWeight,
    Merged,
    Original,
    offloading_hooks,
    takes_dense,
)
from disha.model import ModelView, join

__all__ = ["merge", "merge_adapters", "unmerge", "unmerge_adapters"]


def merge_adapters(
    model: nn.Module,
    adapter: str | Sequence[str] | None = None,
    *,
    untie: bool = False,
    dense: bool = False,
) -> None:
    """Add adapters to the weights: W becomes W + sum of s * dW, each dW from the original W.

    Computed in float32 (float64 for float64 weights) and rounded once. While merged, the layers
    run at the speed of plain ones, no other adapter acts, `state_dict()` holds the merged weights,
    and whatever would mix merged and unmerged adapters raises.

    Args:
        model: the whole model: a weight that a module outside of it shares is not seen.
        adapter: the adapter, or several, to merge; the active ones by default.
        untie: where a weight is shared with another module (an output head tied to the embedding,
            say), give the adapted layer a merged weight of its own instead of raising.
            `unmerge_adapters` ties it again.
        dense: where a weight is quantised, let the layer compute with a dense merged weight,
            W dequantised + sum of s * dW, instead of raising: a plain linear layer, in memory and
            in `state_dict()` too. Its dtype is the one that the layer computes in: the compute
            dtype of bitsandbytes' 4-bit layers (before the first forward, if none was given, the
            dtype before quantising), float32 for its 8-bit layers, the tensor's for torchao.
            `unmerge_adapters` gives back the quantised weight, the very same parameter.

    Raises:
        ArgumentError: there is no such adapter, or none is active.
        MergeError: adapters are merged already; a merged weight would not be finite; a weight is
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
    """
    merge(ModelView(model), adapter, untie=untie, dense=dense)


def merge(
    view: ModelView,
    adapter: str | Sequence[str] | None = None,
    *,
    untie: bool = False,
    dense: bool = False,
) -> None:
    """Do as `merge_adapters`."""
    view.refuse_inside("merge adapters")
    _refuse_sharded(view, "merge adapters")
    chosen = _chosen(view, adapter)
    shared = set()
    for name, layer, adapters in chosen:
        for weight in _merged_weights(layer, adapters):
            shared_with = _sharers(view, name, weight)
            _check_mergeable(name, weight, shared_with, untie)
            _check_quantised(name, weight, dense)
            if shared_with:
                shared.add((layer, weight.slot.parameter))
    # Not in inference mode: the merged weight has to be fit for training after it.
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as undo:
        for name, layer, adapters in chosen:
            undo.callback(_unmerge_layer, layer)
            layer.disha.merged = Merged(adapters, {})
            for weight in _merged_weights(layer, adapters):
                _merge_weight(name, weight, adapters, (layer, weight.slot.parameter) in shared)
        for _, layer in view.layers:
            if layer.disha.merged is None:
                undo.callback(_unmerge_layer, layer)
                layer.disha.merged = Merged()
        undo.pop_all()


def unmerge_adapters(model: nn.Module) -> None:
    """Put the original weights back, bit for bit; the adapters act again. No-op if none is merged.

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
    unmerge(ModelView(model))


def unmerge(view: ModelView) -> None:
    """Do as `unmerge_adapters`."""
    layers = [layer for _, layer in view.layers]
    if any(layer.disha.merged is not None for layer in layers):
        _refuse_sharded(view, "unmerge adapters")
    for layer in layers:
        _refuse_offloaded(layer)
    for layer in layers:
        _unmerge_layer(layer)


def _refuse_offloaded(layer: AdaptedLayer) -> None:
    """Raise if the merged weight is kept elsewhere, and comes back with every forward.

    Raises:
        MergeError: the adapters would act on a weight that they are merged into.
    """
    merged = layer.disha.merged if offloading_hooks(layer) else None
    for name, original in () if merged is None else merged.originals.items():
        now = layer._parameters[name]
        before = original.data if original.parameter is None else original.parameter
        if now is not None and before is not None and now.is_meta and not before.is_meta:
            raise MergeError(
                f"can't unmerge adapters: the merged {name} of a {layer.original_class.__name__} "
                "is offloaded, and its hook would bring it again; remove the hooks first "
                "(accelerate.hooks.remove_hook_from_submodules)"
            )


def _merged_weights(layer: AdaptedLayer, adapters: tuple[str, ...]) -> list[AdaptedWeight]:
    """Return one adapted weight for each parameter that the adapters change."""
    found: dict[str, AdaptedWeight] = {}
    for (adapter, name), block in layer.disha.blocks().items():
        if adapter in adapters:
            found.setdefault(block.slot.parameter, AdaptedWeight(layer, name))
    return list(found.values())


def _refuse_sharded(view: ModelView, action: str) -> None:
    module = view.sharded
    if module is not None:
        raise MergeError(
            f"can't {action} in a model with sharded parameters ({type(module).__name__}): each "
            "rank has a part of every weight only. Save the adapter (save_adapter, on all ranks), "
            "load it into the plain model, and merge there"
        )


Chosen = tuple[str, AdaptedLayer, tuple[str, ...]]


def _chosen(view: ModelView, adapter: str | Sequence[str] | None) -> list[Chosen]:
    """Return the layers to merge, each with its adapters."""
    layers = view.layers
    if adapter is None:
        chosen = [
            (name, layer, tuple(a for a in layer.disha.active if a in layer.disha))
            for name, layer in layers
        ]
    else:
        if not isinstance(adapter, Sequence):
            raise ArgumentTypeError(
                f"adapter must be a name or a list of names, got {adapter!r} of type "
                f"{type(adapter).__name__}"
            )
        wanted = (adapter,) if isinstance(adapter, str) else tuple(adapter)
        for one in wanted:
            view.require(one)
        if len(set(wanted)) != len(wanted):
            raise ArgumentError(f"an adapter can be merged only once, got {list(wanted)}")
        chosen = [
            (name, layer, tuple(a for a in wanted if a in layer.disha)) for name, layer in layers
        ]
    chosen = [(name, layer, adapters) for name, layer, adapters in chosen if adapters]
    if not chosen:
        raise ArgumentError(
            "there is nothing to merge: no adapter is active; inject or load one, or name one"
        )
    return chosen


def _sharers(view: ModelView, name: str, weight: AdaptedWeight) -> list[str]:
    """Return the names that a weight has besides those by way of its own layer and attribute."""
    attribute = weight.slot.parameter
    parameter = view.parameters_by_name.get(join(name, attribute))
    own = {join(alias, attribute) for alias in view.names[weight.layer]}
    return [] if parameter is None else [full for full in parameter.names if full not in own]


def _check_mergeable(name: str, weight: AdaptedWeight, shared_with: list[str], untie: bool) -> None:
    full, parameter = join(name, weight.slot.parameter), weight.parameter
    if parameter is None and weight.quantisation is None:
        raise MergeError(
            f"{full} is computed from other parameters (a parametrization), so "
            "nothing can be merged into it. Save the adapter, remove it and the parametrization "
            "(torch.nn.utils.parametrize.remove_parametrizations), and load it again"
        )
    blocks = [block.block for block in weight.layer.disha.blocks().values()]
    if any(tensor is not None and tensor.is_meta for tensor in (parameter, *blocks)):
        raise MergeError(
            f"{full} or its adapter is on the meta device; give the model its weights first"
        )
    if shared_with and not untie:
        raise MergeError(
            f"{full} is shared with {', '.join(shared_with)}, which merging "
            "would change too; pass untie=True to give this layer a weight of its own while merged"
        )


def _check_quantised(name: str, weight: AdaptedWeight, dense: bool) -> None:
    quantisation = weight.quantisation
    if quantisation is None:
        return
    full, original = join(name, weight.slot.parameter), weight.layer.original_class
    if quantisation.read is None:
        raise MergeError(
            f"{full} is quantised ({quantisation.name}) and can't be read as numbers, so nothing "
            "can be merged into it; its adapters act as well unmerged"
        )
    if quantisation is ROUNDED:
        raise MergeError(
            f"{full} is {quantisation.name}, which does not compute the same from a merged weight; "
            "leave its adapters unmerged, which act as well"
        )
    if not dense:
        raise MergeError(
            f"{full} is quantised ({quantisation.name}), and its few values can't hold an "
            "update; pass dense=True to let the layer compute with a dense merged weight until "
            "unmerge_adapters, or leave the adapters unmerged, which act as well"
        )
    if weight.parameter is None or not takes_dense(weight.layer):
        raise MergeError(
            f"{name or 'the model'} is a {original.__name__} with a forward of "
            f"its own over a quantised weight ({quantisation.name}), which could not compute with "
            "a dense one; leave its adapters unmerged, which act as well"
        )


def _merge_weight(
    name: str, weight: AdaptedWeight, adapters: tuple[str, ...], shared: bool
) -> None:
    layer, slot, parameter = weight.layer, weight.slot, weight.parameter
    assert parameter is not None
    assert layer.disha.merged is not None
    with without_autocast(parameter.device):
        merged = weight.merged(adapters)
    if not torch.isfinite(merged).all():
        raise MergeError(
            f"merging {', '.join(map(repr, adapters))} into {join(name, slot.parameter)} gives "
            "values that are not finite; check the adapter's blocks and its scale"
        )
    originals = dict(layer.disha.merged.originals)
    if weight.quantisation is not None:
        originals[slot.parameter] = Original(parameter=parameter, dense=True)
    else:
        originals[slot.parameter] = Original(parameter.data, parameter if shared else None)
    layer.disha.merged = Merged(adapters, originals)
    if originals[slot.parameter].parameter is not None:
        replacement = nn.Parameter(merged, requires_grad=parameter.requires_grad)
        layer._parameters[slot.parameter] = replacement
    else:
        # Swapping the data keeps the parameter object and costs one copy of the weight, not two.
        parameter.data = merged


def _unmerge_layer(layer: AdaptedLayer) -> None:
    merged = layer.disha.merged
    if merged is None:
        return
    for name, original in merged.originals.items():
        now = layer._parameters[name]
        assert now is not None
        if original.parameter is not None and original.dense:
            layer._parameters[name] = _moved(original.parameter, now.device)
        elif original.parameter is not None:
            layer._parameters[name] = original.parameter
        elif original.data is not None:
            # The weight may have moved since; the original follows it.
            now.data = original.data.to(device=now.device, dtype=now.dtype)
    layer.disha.merged = None


def _moved(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    """Return a quantised parameter on a device: itself, if it is there."""
    if parameter.device == device:
        return parameter
    moved = parameter.to(device)  # as a parameter, where its class has a way of its own
    return moved if isinstance(moved, nn.Parameter) else nn.Parameter(moved, requires_grad=False)
