"""Merge adapters into the weights, and restore the original weights bit for bit.

Only these functions merge; neither `eval()` nor a forward does. The original of a weight is kept
while it is merged, so unmerging is exact.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from contextlib import ExitStack
from typing import TypeVar

import torch
from torch import Tensor, nn

from disha.errors import ArgumentError, MergeError, ModeError
from disha.functional.shard_sums import merge_dtype, without_autocast
from disha.layers.adapted import AdaptedLayer, set_class, set_state
from disha.layers.adapters import Merged, Original
from disha.layers.bitsandbytes import is_library_forward
from disha.layers.blocks import AdapterBlock
from disha.layers.fingerprints import checksums, has_changed
from disha.layers.offloading import offloading_hooks
from disha.layers.quantized import ROUNDED, quantization_of, takes_dense
from disha.layers.spec import BlockSpec
from disha.layers.weights import adapted_weights, stored_weight, sum_with_updates
from disha.model.control import check_names
from disha.model.removal import check_removable, take_out
from disha.model.state import is_finite_as
from disha.model.view import ModelView, all_or_nothing
from disha.sharding.tensor_parallel import split_of
from disha.sharding.tensors import is_sharded, local_part, write
from disha.sharding.zero import is_partitioned
from disha.text import join

M = TypeVar("M", bound=nn.Module)


def merge_adapters(
    model: M,
    adapter: str | Sequence[str] | None = None,
    *,
    untie: bool = False,
    dense: bool = False,
    unload: bool = False,
) -> M:
    """Add adapters to the weights: W becomes W + sum of s * dW; return the same model.

    Each dW is computed from the original W.

    The sum is computed in float32 (float64 for float64 weights) and rounded once. While adapters
    are merged, layers are as fast as plain ones, no other adapter acts, and `state_dict()` has the
    merged weights. Operations that would mix merged and unmerged adapters raise.

    Args:
        model: the complete model. If a weight is shared with a module outside of it, this is not
            noticed.
        adapter: the adapter, or several, to merge; the active ones by default.
        untie: if a weight is shared with a module that does not see the same updates, because
            `exclude` leaves it out of an adapter, give each a merged weight of its own instead of
            raising. `unmerge_adapters` shares it again.
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

    Returns:
        `model` itself.

    Raises:
        ArgumentError: there is no such adapter, or no adapter is active.
        ModeError: this thread or another one is in a context of the model.
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
        >>> model = disha.merge_adapters(model)
        >>> torch.allclose(model(x), before, atol=1e-5)
        True
        >>> disha.unmerge_adapters(model)
        >>> torch.equal(model.base_weight, weight)
        True
        >>> model = disha.merge_adapters(model, unload=True)
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
            layers = [layer for layer in view.find_layers() if layer.disha.is_dense]
            take_out(view, view.adapters)
            for layer in layers:
                _compute_densely(layer, undo)
            view.forget_buffers()
    return model


def _compute_densely(layer: nn.Module, undo: ExitStack) -> None:
    """Turn a layer of bitsandbytes that has a dense weight into an `nn.Linear`."""
    if not is_library_forward(type(layer)):
        return
    set_class(layer, nn.Linear)
    weight = layer._parameters["weight"]
    bias = layer._parameters["bias"]
    if bias is not None and weight is not None:
        cast = nn.Parameter(bias.to(weight.dtype), bias.requires_grad)
        _replace(layer, "bias", cast, undo)


def merge(
    view: ModelView,
    undo: ExitStack,
    adapter: str | Sequence[str] | None = None,
    *,
    untie: bool = False,
    dense: bool = False,
    only: Container[nn.Module] | None = None,
) -> None:
    """Merge adapters as `merge_adapters` says, and let `undo` take it back.

    If only some layers merge, those that are tied to them have to be among them.
    """
    view.refuse_inside("merge adapters")
    contexts = view.open_contexts()
    if contexts:
        raise ModeError(
            f"can't merge adapters while another thread or task is inside {contexts[0].function}, "
            "where it would change what the model computes; merge when that has ended"
        )
    view.refuse_half_of_ties("merge adapters")
    refuse_sharded(view, "merge adapters")
    with view.ranks.fail_together("merge adapters"):
        _merge_together(view, undo, adapter, untie, dense, only)


def _merge_together(
    view: ModelView,
    undo: ExitStack,
    adapter: str | Sequence[str] | None,
    untie: bool,
    dense: bool,
    only: Container[nn.Module] | None,
) -> None:
    """Merge adapters; ranks do so alone, each its part."""
    # Inference mode is off, because tensors that are made in it can never be trained.
    with torch.inference_mode(False), torch.no_grad():
        chosen = _choose(view, adapter)
        # A tied parameter is merged once for all modules that see the same updates of it.
        merged = {}
        merged_once: dict[tuple[int, frozenset[AdapterBlock]], tuple[Original, Tensor]] = {}
        for layer, adapters in chosen.items():
            if only is not None and layer not in only:
                continue
            originals = {}
            for parameter, spec in adapted_weights(layer, adapters).items():
                name = join(view.names[layer][0], parameter)
                reason = _reason_against(layer, spec, dense)
                if reason is not None:
                    raise MergeError(f"{name} {reason}")
                blocks = _blocks_at(view, name, chosen)
                names = view.parameters_by_name[name].names
                others = [other for other in names if _blocks_at(view, other, chosen) != blocks]
                if others and not untie:
                    raise MergeError(
                        f"{name} is shared with {', '.join(sorted(others))}, where not all of the "
                        "same adapters act, but which merging would change too; pass untie=True to "
                        "merge into a weight of its own"
                    )
                key = id(layer._parameters[parameter]), blocks
                if key not in merged_once:
                    merged_once[key] = _compute_merged(
                        name, layer, spec, adapters, unties=bool(others)
                    )
                originals[parameter], new = merged_once[key]
                _replace(layer, parameter, new, undo)
            merged[layer] = Merged(adapters, originals)
        _set_merged(view, merged, undo)


def _blocks_at(
    view: ModelView, name: str, chosen: Mapping[AdaptedLayer, tuple[str, ...]]
) -> frozenset[AdapterBlock]:
    """Return the blocks that merge into the parameter of this name: none if it is not adapted."""
    owner, _, parameter = name.rpartition(".")
    layer = view.modules[owner]
    if not isinstance(layer, AdaptedLayer) or layer not in chosen:
        return frozenset()
    return frozenset(layer.disha.blocks_for(parameter, chosen[layer]))


def _replace(module: nn.Module, name: str, new: Tensor, undo: ExitStack) -> None:
    """Put a new parameter in the place of one, or a plain tensor in the place of its data.

    A new parameter can have another dtype, and modules that share the old one keep it. New data
    reaches these too.
    """
    now = module._parameters[name]
    assert now is not None
    if is_sharded(now) and not isinstance(new, nn.Parameter):
        write(now, new, undo)
    elif isinstance(new, nn.Parameter):
        undo.callback(module._parameters.__setitem__, name, now)
        module._parameters[name] = new
    else:
        undo.callback(setattr, now, "data", now.data)
        now.data = new


def _set_merged(
    view: ModelView, merged: Mapping[AdaptedLayer, Merged | None], undo: ExitStack
) -> None:
    """Let layers have these adapters merged, and let their models remember it."""
    for layer, of_layer in merged.items():
        state = layer.disha.state(type(layer))
        undo.callback(set_state, layer, state)
        set_state(layer, state.but(merged=of_layer))
    for memory in view.memories:
        names = [
            name
            for adapters in list(memory.members)
            if adapters.merged is not None
            for name in adapters.merged.adapters
        ]
        undo.callback(setattr, memory, "state", memory.state)
        memory.state = memory.state.but(merged=tuple(dict.fromkeys(names)))


def unmerge_adapters(model: nn.Module) -> None:
    """Restore the original weights, bit for bit. The adapters act again.

    If no adapter is merged, this does nothing.

    Args:
        model: a model with adapters.

    Raises:
        MergeError: a weight is no longer what merging wrote, because it was trained or quantised
            since; or the model was sharded or offloaded (accelerate).

    The model is unchanged whenever this raises.

    Examples:
        >>> import torch
        >>> import disha
        >>> layer = disha.BatLinear(8, 4, r=4, init="kaiming")
        >>> original = layer.base_weight.clone()
        >>> layer = disha.merge_adapters(layer)
        >>> torch.equal(layer.weight, original)
        False
        >>> disha.unmerge_adapters(layer)
        >>> torch.equal(layer.base_weight, original)
        True
    """
    view = ModelView(model)
    originals = {
        layer: layer.disha.merged.originals
        for layer in view.find_layers()
        if layer.disha.merged is not None
    }
    if not originals:
        return
    view.refuse_half_of_ties("unmerge adapters")
    refuse_sharded(view, "unmerge adapters")
    with view.ranks.fail_together("unmerge adapters"):
        _refuse_changed(view, originals)
    with all_or_nothing(view) as undo:
        for layer, of_layer in originals.items():
            for parameter, original in of_layer.items():
                _replace(layer, parameter, _get_original(layer, parameter, original), undo)
        _set_merged(view, dict.fromkeys(originals), undo)


def _refuse_changed(
    view: ModelView, originals: Mapping[AdaptedLayer, Mapping[str, Original]]
) -> None:
    """Raise if a merged weight is no longer what merging wrote."""
    for layer, of_layer in originals.items():
        for parameter, original in of_layer.items():
            change = _change_since_merging(layer, parameter, original)
            if change is not None:
                name = join(view.names[layer][0], parameter)
                raise MergeError(
                    f"{name} was {change} after adapters were merged into it, and unmerging would "
                    "undo that; undo it first, or load the base again. To keep such a change, "
                    "merge with unload=True before you make it"
                )


def _change_since_merging(layer: AdaptedLayer, parameter: str, original: Original) -> str | None:
    """Return what was done to a merged weight, or None if it has the values that merging wrote."""
    now = layer._parameters.get(parameter)
    if now is None:
        return "parametrised"
    if quantization_of(None, now) is not None:
        return "quantised"
    if offloading_hooks(layer):
        return None  # the values are on another device
    if getattr(layer, "max_norm", None) is not None:
        return None  # the forward of an embedding scales rows of whatever its weight is
    return "changed" if has_changed(local_part(now), original.written) else None


def refuse_sharded(view: ModelView, action: str) -> None:
    if view.is_sharded and not _is_only_parallel(view):
        raise MergeError(
            f"can't {action} in a model with sharded parameters; save the adapter on all ranks "
            "(save_adapter), and merge it into the plain model"
        )


def _is_only_parallel(view: ModelView) -> bool:
    """Whether all that is sharded are weights that a plan had cut before they were adapted."""
    if any(wrapper.shards for _, wrapper in view.wrappers):
        return False
    if any(map(is_partitioned, view.list_parameters())):
        return False
    for layer in view.find_layers():
        for block in layer.disha.blocks_by_name().values():
            split = split_of(stored_weight(layer, block.spec.parameter))
            if split is not None and not split.reads(block.block, block.split):
                return False
    return True


def _choose(
    view: ModelView, adapter: str | Sequence[str] | None
) -> dict[AdaptedLayer, tuple[str, ...]]:
    """Return each layer -> the adapters to merge into it, by default its active ones."""
    adapters = None if adapter is None else check_names(view, adapter)
    chosen = {}
    for layer in view.find_layers():
        wanted = layer.disha.active if adapters is None else adapters
        chosen[layer] = tuple(name for name in wanted if name in layer.disha)
    if not any(chosen.values()):
        raise ArgumentError(
            "there is nothing to merge: no adapter is active. Inject or load one, or pass adapter="
        )
    return chosen


def _reason_against(layer: AdaptedLayer, spec: BlockSpec, dense: bool) -> str | None:
    """Return why nothing can be merged into a weight, and what to do; None if it can."""
    parameter = layer._parameters.get(spec.parameter)  # None if the weight is computed or packed
    quantization = quantization_of(layer, stored_weight(layer, spec.parameter))
    if parameter is None and quantization is None:
        return (
            "is computed from other parameters (a parametrization); save the adapter, remove it "
            "and the parametrization (or load a base without it), and load the adapter again"
        )
    blocks = [block.block for block in layer.disha.blocks_by_name().values()]
    if any(tensor is not None and tensor.is_meta for tensor in (parameter, *blocks)):
        return (
            "has no values yet, or its block has none (meta device); give the model its values "
            "first"
        )
    if quantization is None:
        return None
    unmerged = "leave its adapters unmerged"
    if quantization.read is None:
        return f"is quantised and can't be read as numbers; {unmerged}"
    if quantization is ROUNDED:
        return f"is rounded by its layer, which would not compute the same with a sum; {unmerged}"
    if not dense:
        return (
            f"is quantised ({quantization.name}), too coarsely for an update; pass dense=True to "
            f"compute with a dense merged weight, or {unmerged}"
        )
    if parameter is None or not takes_dense(layer):
        cls = layer._original_class.__name__
        return f"is quantised, and its layer is a {cls} with a forward of its own; {unmerged}"
    return None


def _compute_merged(
    name: str, layer: AdaptedLayer, spec: BlockSpec, adapters: tuple[str, ...], *, unties: bool
) -> tuple[Original, Tensor]:
    """Return the original of a weight, and what `_replace` puts in its place.

    If it `unties` the weight, this is a new parameter, because other modules keep the old one.
    """
    parameter = layer._parameters[spec.parameter]
    assert parameter is not None
    with without_autocast(parameter):
        merged = sum_with_updates(layer, spec, adapters, in_parts=is_sharded(parameter))
    if not is_finite_as(merged, merge_dtype(merged.dtype)):  # in 8 bits, torch can't tell
        raise MergeError(
            f"merging {', '.join(map(repr, adapters))} into {name} gives values that are not "
            "finite; check the adapter's blocks and its scale"
        )
    if parameter.is_inference():  # it can only get data that is made in inference mode as well
        with torch.inference_mode():
            merged = merged.clone()
    was_quantized = quantization_of(layer, parameter) is not None
    written = checksums(local_part(merged))
    if unties or was_quantized:
        new = nn.Parameter(merged, requires_grad=parameter.requires_grad)
        return Original(parameter, was_quantized, written), new
    # The parameter stays the same object, and gets other data: a DTensor in its own memory.
    former = parameter.data.clone() if is_sharded(parameter) else parameter.data
    return Original(former, was_quantized, written), merged


def _get_original(layer: AdaptedLayer, name: str, original: Original) -> Tensor:
    """Return the original of a merged weight, where the merged one is now, and in its dtype."""
    now = layer._parameters[name]
    former = original.weight
    assert now is not None
    if now.is_meta and not former.is_meta and offloading_hooks(layer):
        raise MergeError(
            f"the merged {name} of a {layer._original_class.__name__} is offloaded; remove the "
            "hooks first (accelerate.hooks.remove_hook_from_submodules)"
        )
    if not isinstance(former, nn.Parameter):  # only data, and the parameter may have moved since
        return former.to(device=now.device, dtype=now.dtype)
    if not original.was_quantized or former.device == now.device:
        return former
    moved = former.to(now.device)  # a parameter, if its class defines `to`
    return moved if isinstance(moved, nn.Parameter) else nn.Parameter(moved, requires_grad=False)
