"""Adapters as state dicts: their tensors by name, and a checked load. No file is involved."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from disha.checks import check_scale
from disha.errors import AdapterStateError
from disha.functional.shard_sums import is_inexact
from disha.layers.adapted import AdaptedLayer, refuse_merged
from disha.layers.blocks import SCALE, AdapterBlock
from disha.layers.weights import stored_weight
from disha.layers.wrappers import clean_key
from disha.model import buffers
from disha.model.view import ModelView, all_or_nothing
from disha.sharding.tensors import local_part, reason_against_writing, write
from disha.sharding.zero import gather_partition, whole_shape
from disha.text import first_few, join

Tensors = Mapping[str, Tensor]
"""Tensors by their keys in a file or a state dict."""


@dataclass(frozen=True)
class LoadReport:
    """The result of a load. Each key is in one of the tuples.

    Attributes:
        matched: keys that fit. Their values were loaded, unless the load failed.
        missing: keys that the adapter has but the state lacks.
        unexpected: keys that the state has but the adapter lacks.
        wrong: (key, reason why its value can't be loaded).

    Examples:
        >>> import torch
        >>> import disha
        >>> layer, values = disha.BoneLinear(8, 16, r=4), torch.ones(4, 16)
        >>> state = {"disha.default.bone_block": values, "head.weight": values}
        >>> report = disha.load_adapter_state_dict(layer, state, strict=False)
        >>> report.complete
        False
        >>> print(report)
        1 key fits
        unexpected: head.weight
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong: tuple[tuple[str, str], ...] = ()

    @property
    def complete(self) -> bool:
        """Whether all keys match."""
        return not (self.missing or self.unexpected or self.wrong)

    def __str__(self) -> str:
        count = len(self.matched)
        fitting = "1 key fits" if count == 1 else f"{count:,} keys fit"
        sections = (
            [fitting],
            [f"missing: {key}" for key in self.missing],
            [f"unexpected: {key}" for key in self.unexpected],
            [f"wrong: {key} {reason}" for key, reason in self.wrong],
        )
        return "\n".join(first_few(section, 20) for section in sections if section)


def adapter_state_dict(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """Return the part of `model.state_dict()` that belongs to an adapter.

    Keys and tensors are those of the state dict, and the tensors share memory with the model.
    `also_train` parameters are included, and the running statistics of batch norms and the scales
    that have changed. So `torch.save` and `model.load_state_dict(state, strict=False)` work with
    the result.

    As in `model.state_dict()`, a wrapper adds its part to the keys. The tensors of a sharded model
    are DTensors, and each rank has its shard of them. `save_adapter` writes clean names and
    gathered tensors instead.

    Args:
        model: a model with adapters.
        adapter: the adapter's name.

    Raises:
        ArgumentError: there is no such adapter.
        AdapterStateError: the model's `state_dict` lacks some of its parameters.

    Examples:
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Sequential(nn.Linear(8, 16)), "0", r=4)
        >>> {key: tuple(value.shape) for key, value in disha.adapter_state_dict(model).items()}
        {'0.disha.default.bone_block': (4, 16)}
    """
    view = ModelView(model)
    tensors = _find_in_state_dict(view, collect_tensors(view, adapter))
    state = {key: gather_partition(tensor).detach() for key, tensor in tensors.items()}
    for key, block in _find_scales(view, adapter, tensors).items():
        saved = block.state_dict()
        if SCALE in saved:
            state[key] = saved[SCALE]
    return state


def _find_in_state_dict(
    view: ModelView, tensors: Tensors, optional: Container[str] = ()
) -> dict[str, Tensor]:
    """Return tensors of the model under their keys in its state dict.

    Raise if the state dict lacks one, unless it is `optional`.
    """
    state = view.model.state_dict(keep_vars=True)
    in_state = set(map(id, state.values()))
    absent = [
        key for key, tensor in tensors.items() if id(tensor) not in in_state and key not in optional
    ]
    if absent:
        raise AdapterStateError(
            f"the model's state_dict lacks {first_few(absent, 3, ', ')}, because a class has a "
            "state_dict of its own; use save_adapter and load_adapter"
        )
    wanted = set(map(id, tensors.values()))
    return {key: value for key, value in state.items() if id(value) in wanted}


def _find_scales(view: ModelView, adapter: str, tensors: Tensors) -> dict[str, AdapterBlock]:
    """Return the key of each scale in the model's state dict -> its block, which is in tensors."""
    blocks = {id(model_block.values): model_block.block for model_block in view.blocks(adapter)}
    return {
        join(key.rpartition(".")[0], SCALE): blocks[id(tensor)]
        for key, tensor in tensors.items()
        if id(tensor) in blocks
    }


def collect_tensors(view: ModelView, adapter: str) -> dict[str, Tensor]:
    """Return an adapter's tensors by key: blocks, other trained parameters, changed buffers."""
    view.reshard()
    tensors = {}
    for name, layer, _, block in view.require(adapter):
        # `block.block` would raise where FullyShardedDataParallel has taken the parameter out.
        values = block._parameters.get(block.parameter_name)
        is_whole = values is not None and len(whole_shape(values)) >= block.method.block_axes
        if not is_whole or not _has_weight(layer, block):
            raise AdapterStateError(
                f"the block of {name or 'the model'} or its weight is missing or flattened, as by "
                "FullyShardedDataParallel; use fully_shard, or call this inside summon_full_params"
            )
        tensors[join(name, block.parameter_name)] = block.block
    for parameter in view.list_trained(adapter):
        if (
            isinstance(parameter.module, AdaptedLayer)  # perhaps merged
            and stored_weight(parameter.module, parameter.attribute) is not parameter.value
        ):
            refuse_merged(view.find_layers(), f"use {parameter.name} as part of the adapter")
        tensors[parameter.name] = parameter.value
    return tensors | buffers.list_changed(view, adapter)


def _has_weight(layer: nn.Module, block: AdapterBlock) -> bool:
    """Whether a layer still has the weight of a block as a matrix."""
    parameter = block.spec.parameter
    weight = layer._parameters.get(parameter, vars(layer).get(parameter))
    return weight is None or block.spec.quantized or len(whole_shape(weight)) >= 2


def load_adapter_state_dict(
    model: nn.Module,
    state: Mapping[str, Tensor],
    adapter: str = "default",
    *,
    strict: bool = True,
) -> LoadReport:
    """Check all tensors of an adapter, then copy them into the model.

    If `fully_shard` has sharded the model, call this on all ranks. The tensors are complete, and
    then the same on each rank, or they are DTensors that are sharded like the model's. If one rank
    fails, all ranks raise, and no model changes.

    Args:
        model: a model that has the adapter already (`inject_adapters`).
        state: the result of `adapter_state_dict`. It may come from a wrapped model and be loaded
            into a plain one, or the other way round: `module.` and `_orig_mod.` make no difference.
            Where it has no scale, that of the injection holds, as in `load_state_dict`.
        adapter: the adapter's name.
        strict: also raise on missing and unexpected keys.

    Returns:
        A `LoadReport`.

    Raises:
        AdapterStateError: the state does not fit; the message lists every reason. With
            `strict=False`, only wrong shapes and values count. The model is unchanged.
        ArgumentError: there is no such adapter, or a scale is not finite.
        MergeError: adapters are merged.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Linear(8, 16), "all-linear", r=4)
        >>> report = disha.load_adapter_state_dict(
        ...     model, {"disha.default.bone_block": torch.ones(4, 16)}
        ... )
        >>> report.matched
        ('disha.default.bone_block',)
    """
    view = ModelView(model)
    with all_or_nothing(view) as undo:
        with view.ranks.fail_together(f"load a state dict as adapter {adapter!r}"):
            refuse_merged(view.find_layers(), "load an adapter")
            saved_buffers = buffers.list_saved(view, adapter)
            tensors = saved_buffers | collect_tensors(view, adapter)
            in_model = _find_in_state_dict(view, tensors, optional=saved_buffers)
            scales = _find_scales(view, adapter, in_model)
            given = _rename_keys(state, (*in_model, *scales))
            new_scales = {
                block: check_scale(float(given.pop(key, block.first_scale)), key)
                for key, block in scales.items()
                if join(key.rpartition(".")[0], block.parameter_name) in given
            }
            # Of the buffers, the state has only those that training had changed.
            buffer_ids = {id(buffer) for buffer in saved_buffers.values()}
            expected = {
                key: tensor
                for key, tensor in in_model.items()
                if key in given or id(tensor) not in buffer_ids
            }
            report = check_fit(expected, given)
            if report.wrong or (strict and not report.complete):
                raise AdapterStateError(
                    f"the state does not fit the model's adapter {adapter!r}; nothing was loaded:\n"
                    f"{report}"
                )
        for key in report.matched:
            write(expected[key], given[key], undo)
        if strict:  # the state is complete, so its adapter has not changed the other buffers
            written = {id(tensor) for tensor in expected.values()}
            kept = [name for name, buffer in saved_buffers.items() if id(buffer) in written]
            buffers.put_back_buffers(view, undo, adapter, excepted=kept)
        for block, scale in new_scales.items():
            block.scale = scale
    return report


def _rename_keys(state: Tensors, expected: Collection[str]) -> dict[str, Tensor]:
    """Return the state with each key replaced by the model's key for the same tensor."""
    model_keys = {clean_key(key): key for key in expected}
    model_keys |= {key: key for key in expected}  # a child `module` of the model is no wrapper
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        model_key = key if key in expected else model_keys.get(clean_key(key), key)
        if model_key in renamed:
            raise AdapterStateError(
                f"the state has {model_key!r} twice, with and without the name of a wrapper; leave "
                "out one of them"
            )
        renamed[model_key] = tensor
    return renamed


def check_fit(expected: Tensors, given: Mapping[str, object]) -> LoadReport:
    """Compare given tensors with those of the model that they shall replace; change nothing."""
    matched = []
    wrong = []
    for key, target in expected.items():
        if key not in given:
            continue
        reason = _reason_against(target, given[key])
        if reason is None:
            matched.append(key)
        else:
            wrong.append((key, reason))
    return LoadReport(
        matched=tuple(matched),
        missing=tuple(key for key in expected if key not in given),
        unexpected=tuple(key for key in given if key not in expected),
        wrong=tuple(wrong),
    )


def _reason_against(target: Tensor, value: object) -> str | None:
    """Return why a tensor can't hold a value, or None if it can."""
    if not isinstance(value, Tensor):
        return f"is not a tensor but a {type(value).__name__}"
    shape = whole_shape(target)
    if value.shape != shape:
        return f"has the shape {tuple(value.shape)}, must be {tuple(shape)}"
    if _kind_of_number(value) != _kind_of_number(target):
        return f"has dtype {value.dtype}, must be {_kind_of_number(target)}"
    if value.is_meta:
        return "has no values"
    if target.is_meta:
        return "can't go into a parameter on the meta device; give the model its weights first"
    reason = reason_against_writing(target, value)
    if reason is None and not is_finite_as(value, target.dtype):
        return f"holds values that are not finite (NaN or infinity) as {target.dtype}"
    return reason


def _kind_of_number(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    return "floating-point" if tensor.is_floating_point() else "an integer"


def is_finite_as(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether all values that this rank holds are finite after a cast to `dtype`."""
    value = local_part(value).detach().to(dtype)
    if not is_inexact(value):
        return True
    if value.itemsize == 1:  # torch does not add up numbers of 8 bits
        value = value.float()
    # A finite sum has finite terms, so only a sum that overflows needs a second look.
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())
