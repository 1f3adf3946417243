"""Merge adapters into the weights, and take them out again bit for bit.

Merging is explicit: never on eval(), never inside forward. The original weight is kept beside the
merged one, so that unmerging is exact whatever was merged, and how often.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn

from disha.errors import ArgumentError, ArgumentTypeError, MergeError
from disha.functional import without_autocast
from disha.layers.adapted import (
    AdaptedLayer,
    MergedWeight,
    WeightSlot,
    refuse_inside,
    refuse_merged,
)
from disha.sharding import sharded_module
from disha.tree import adapted_layers, join, module_names, require_adapter

__all__ = ["merge_adapters", "unmerge_adapters"]


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
            shared, computed or quantised; a layer with a forward of its own would not compute the
            same; or the model is sharded (`fully_shard`).

    The model is unchanged whenever this raises.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Linear(8, 4), "all-linear", r=4, init="kaiming")
        >>> x = torch.randn(2, 8)
        >>> before, weight = model(x), model.weight.clone()
        >>> disha.merge_adapters(model)
        >>> torch.allclose(model(x), before, atol=1e-5)
        True
        >>> disha.unmerge_adapters(model)
        >>> torch.equal(model.weight, weight)
        True
    """
    layers = list(adapted_layers(model))
    refuse_inside((layer for _, layer in layers), "merge adapters")
    _refuse_sharded(model, "merge adapters")
    chosen = _chosen(model, layers, adapter)
    users = _parameter_users(model)
    sharers = [_sharers(layer, users) for _, layer, _ in chosen]
    for (name, layer, _), shared_with in zip(chosen, sharers, strict=True):
        refuse_merged(_packed_with(layer), "merge adapters")
        _check_mergeable(name, layer, shared_with, untie)
        _check_quantised(name, layer, dense)
    originals: Originals = {}
    # Not in inference mode: the merged weight has to be fit for training after it.
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as undo:
        for (name, layer, adapters), shared_with in zip(chosen, sharers, strict=True):
            _merge_layer(name, layer, adapters, bool(shared_with), originals, undo)
        for _, layer in layers:
            if layer.disha.merged is None:
                layer.disha.merged = MergedWeight()
        undo.pop_all()


def unmerge_adapters(model: nn.Module) -> None:
    """Put the original weights back, bit for bit; the adapters act again. No-op if none is merged.

    Args:
        model: a model with adapters.

    Raises:
        MergeError: the model was sharded after adapters were merged.

    Examples:
        >>> import torch
        >>> import disha
        >>> layer = disha.BatLinear(8, 4, r=4, init="kaiming")
        >>> weight = layer.weight.clone()
        >>> disha.merge_adapters(layer)
        >>> torch.equal(layer.weight, weight)
        False
        >>> disha.unmerge_adapters(layer)
        >>> torch.equal(layer.weight, weight)
        True
    """
    layers = [layer for _, layer in adapted_layers(model)]
    if any(layer.disha.merged is not None for layer in layers):
        _refuse_sharded(model, "unmerge adapters")
    for layer in layers:
        for one in _packed_with(layer):
            _unmerge_layer(one)


def _packed_with(layer: AdaptedLayer) -> list[AdaptedLayer]:
    """Return the layers that keep their weight in the same parameter of one owner: one original.

    `model` may be a part that has only some of them.
    """
    slot = layer.weight_slot
    if slot.rows is None:
        return [layer]
    children = [child for child in slot.module.children() if isinstance(child, AdaptedLayer)]
    return [one for one in children if one.weight_slot.rows is not None]


def _refuse_sharded(model: nn.Module, action: str) -> None:
    module = sharded_module(model)
    if module is not None:
        raise MergeError(
            f"can't {action} in a model with sharded parameters ({type(module).__name__}): each "
            "rank has a part of every weight only. Save the adapter (save_adapter, on all ranks), "
            "load it into the plain model, and merge there"
        )


Chosen = tuple[str, AdaptedLayer, tuple[str, ...]]


def _chosen(
    model: nn.Module, layers: list[tuple[str, AdaptedLayer]], adapter: str | Sequence[str] | None
) -> list[Chosen]:
    """Return the layers to merge, each with its adapters."""
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
            require_adapter(model, one)
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


Users = dict[int, list[tuple[nn.Module, str]]]


def _parameter_users(model: nn.Module) -> Users:
    """Return id of a parameter -> the modules that hold it, with its clean name there."""
    users: Users = {}
    for module, (name, *_) in module_names(model).items():
        for own_name, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(id(parameter), []).append((module, join(name, own_name)))
    return users


def _sharers(layer: AdaptedLayer, users: Users) -> list[str]:
    """Return the names under which other modules hold this layer's weight."""
    slot = layer.weight_slot
    return [name for module, name in users.get(id(slot.parameter), ()) if module is not slot.module]


def _check_mergeable(name: str, layer: AdaptedLayer, shared_with: list[str], untie: bool) -> None:
    parameter = layer.weight_slot.parameter
    if parameter is None:
        raise MergeError(
            f"{name}.{layer.weight_name} is computed from other parameters (a parametrization), so "
            "nothing can be merged into it. Save the adapter, remove it and the parametrization "
            "(torch.nn.utils.parametrize.remove_parametrizations), and load it again"
        )
    blocks = [layer.disha[adapter].block for adapter in layer.disha]
    if any(tensor.is_meta for tensor in (parameter, *blocks)):
        raise MergeError(
            f"{name}.{layer.weight_name} or its adapter is on the meta device; give the model its "
            "weights first"
        )
    if shared_with and not untie:
        raise MergeError(
            f"{name}.{layer.weight_name} is shared with {', '.join(shared_with)}, which merging "
            "would change too; pass untie=True to give this layer a weight of its own while merged"
        )


def _check_quantised(name: str, layer: AdaptedLayer, dense: bool) -> None:
    quantisation = layer.quantisation(layer)
    if quantisation is None:
        return
    weight = join(name, layer.weight_name)
    if quantisation.read is None:
        raise MergeError(
            f"{weight} is quantised ({quantisation.name}) and can't be read as numbers, so nothing "
            "can be merged into it; its adapters act as well unmerged"
        )
    if not dense:
        raise MergeError(
            f"{weight} is quantised ({quantisation.name}), and its few values can't hold an "
            "update; pass dense=True to let the layer compute with a dense merged weight until "
            "unmerge_adapters, or leave the adapters unmerged, which act as well"
        )
    if quantisation.in_kernels and not type(layer).library_forward:
        raise MergeError(
            f"{name or 'the model'} is a {type(layer).original_class.__name__} with a forward of "
            f"its own over a quantised weight ({quantisation.name}), which could not compute with "
            "a dense one; leave its adapters unmerged, which act as well"
        )


Originals = dict[tuple[nn.Module, str], MergedWeight]
"""Module and name of each parameter that holds a merge now -> what it was."""


def _merge_layer(
    name: str,
    layer: AdaptedLayer,
    adapters: tuple[str, ...],
    shared: bool,
    originals: Originals,
    undo: ExitStack,
) -> None:
    parameter = layer.weight_slot.parameter
    assert parameter is not None
    with without_autocast(parameter.device):
        merged = layer.merged_weight(adapters)
    if not torch.isfinite(merged).all():
        raise MergeError(
            f"merging {', '.join(map(repr, adapters))} into {name}.{layer.weight_name} gives "
            "values that are not finite; check the adapter's blocks and its scale"
        )
    quantised = layer.quantisation(layer) is not None
    # The kernels of quantised layers round more than a probe could allow for.
    exempt = quantised and type(layer).library_forward
    probe = _Probe(layer, adapters) if type(layer).own_forward and not exempt else None
    slot = layer.weight_slot
    original = originals.get((slot.module, slot.name)) or _original(slot, shared, quantised)
    layer.disha.merged = replace(original, adapters=adapters)
    undo.callback(_unmerge_layer, layer)
    if (slot.module, slot.name) not in originals:
        originals[slot.module, slot.name] = original
        _open_for_merge(slot, original)
    _write(slot, merged)
    if probe is not None and not probe.agrees():
        raise MergeError(
            f"{name} is a {type(layer).original_class.__name__} with a forward of its own, which "
            "does not compute the same from the merged weight as with the adapter; leave it "
            "unmerged by merging other adapters only, or exclude it"
        )


def _original(slot: WeightSlot, shared: bool, quantised: bool) -> MergedWeight:
    """Return what unmerging will need of a parameter that holds no merge yet."""
    parameter = slot.parameter
    assert parameter is not None
    if quantised:
        return MergedWeight(parameter=parameter, dense=True)
    return MergedWeight(data=parameter.data, parameter=parameter if shared else None)


def _open_for_merge(slot: WeightSlot, original: MergedWeight) -> None:
    """Untie the layer from a shared parameter, and give the rows of several layers new data."""
    parameter = slot.parameter
    assert parameter is not None
    if original.parameter is not None:
        stand_in = torch.empty(0) if original.dense else parameter.data
        parameter = nn.Parameter(stand_in, requires_grad=parameter.requires_grad)
        slot.module._parameters[slot.name] = parameter
    if slot.rows is not None:
        parameter.data = parameter.data.clone()


def _write(slot: WeightSlot, merged: Tensor) -> None:
    parameter = slot.parameter
    assert parameter is not None
    if slot.rows is None:
        # Swapping the data keeps the parameter object and costs one copy of the weight, not two.
        parameter.data = merged
    else:
        parameter.data[slot.rows] = merged


def _unmerge_layer(layer: AdaptedLayer) -> None:
    merged, slot = layer.disha.merged, layer.weight_slot
    if merged is None:
        return
    if merged.parameter is not None and merged.dense:
        stand_in = slot.parameter
        assert stand_in is not None
        slot.module._parameters[slot.name] = _moved(merged.parameter, stand_in.device)
    elif merged.parameter is not None:
        slot.module._parameters[slot.name] = merged.parameter
    elif merged.data is not None:
        parameter = slot.parameter
        assert parameter is not None
        # The weight may have moved since; the original follows it.
        parameter.data = merged.data.to(device=parameter.device, dtype=parameter.dtype)
    layer.disha.merged = None


def _moved(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    """Return a quantised parameter on a device: itself, if it is there."""
    if parameter.device == device:
        return parameter
    moved = parameter.to(device)  # as a parameter, where its class has a way of its own
    return moved if isinstance(moved, nn.Parameter) else nn.Parameter(moved, requires_grad=False)


class _Probe:
    """Compares a layer's output before and after its merge, on a random input."""

    def __init__(self, layer: AdaptedLayer, adapters: tuple[str, ...]) -> None:
        self.layer = layer
        generator = torch.Generator().manual_seed(0)
        weight: Tensor = getattr(layer, layer.weight_name)
        example = layer.example_input(layer, generator).to(weight.device)
        self.input = example.to(weight.dtype) if example.is_floating_point() else example
        active = layer.disha.active
        layer.disha.activate(adapters)
        try:
            self.before = self._output()
        finally:
            layer.disha.activate(active)

    def agrees(self) -> bool:
        epsilon = torch.finfo(self.before.dtype).eps
        return torch.allclose(
            self.before, self._output(), rtol=64 * epsilon, atol=64 * epsilon * self._magnitude()
        )

    def _magnitude(self) -> float:
        return max(1.0, float(self.before.abs().max()))

    def _output(self) -> Tensor:
        # Straight to forward: the user's hooks are not ours to run. In eval mode: dropout would
        # make two runs differ.
        modes = [(module, module.training) for module in self.layer.modules()]
        try:
            self.layer.eval()
            with without_autocast(self.input.device):
                output: Tensor = self.layer.forward(self.input)
        except Exception as error:
            raise MergeError(
                f"{type(self.layer).original_class.__name__} has a forward of its own, and whether "
                "it computes the same from a merged weight can't be told: called with an input of "
                f"shape {tuple(self.input.shape)}, it raised {type(error).__name__}: {error}. "
                "Merge other adapters only, or exclude the layer"
            ) from error
        finally:
            for module, training in modes:
                module.training = training
        return output
