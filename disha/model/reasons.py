"""Why a weight can't be adapted, or a parameter can't be trained with an adapter.

Each public function returns the reason, or None if there is none. The others yield reasons in the
order in which they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.sparse import SparseSemiStructuredTensor

from disha.checks import TRAINABLE_DTYPES
from disha.functional import Update, method_names
from disha.functional.parts import update_of_part
from disha.functional.shard_sums import is_inexact
from disha.layers.adapted import AdaptedLayer
from disha.layers.blocks import AdapterBlock, Slot
from disha.layers.quantized import quantization_of
from disha.layers.weights import read_weight, stored_weight
from disha.model.plan import PlannedLayer
from disha.model.records import LayerRecord
from disha.model.view import ModelBuffer, ModelParameter
from disha.sharding.tensor_parallel import split_of
from disha.sharding.zero import whole_shape

ADDED_NAMES = ("disha", "base_weight", "delta_weight")
"""The public names that adapting adds to a module."""


# --- against adapting a weight -------------------------------------------------------------------


def reason_against_adapting(layer: PlannedLayer) -> str | None:
    """Return why the method can't adapt the weight, whatever the size of the block."""
    return next(_reasons_against_adapting(layer), None)


def _reasons_against_adapting(layer: PlannedLayer) -> Iterator[str]:
    """Yield the reason; what follows it may not hold, so only the first one counts."""
    slot = layer.slot
    module = layer.module
    if slot is None and not layer.attribute:
        yield f"no layer kind adapts {type(module).__qualname__}"
    if slot is None:
        yield (
            f"the layout of this weight {layer.shape} is unknown; declare it, such as "
            f"{layer.remedy}, as your code uses it: see docs/guides/custom-model.md"
        )
        return
    clashes = _find_clashing_names(module) - {layer.attribute}
    if clashes and not isinstance(module, AdaptedLayer):
        yield f"it has its own attribute {min(clashes)!r}, which adapters would replace"
    for block in _list_other_blocks(layer):
        other_layout = block.slot.layout
        of_one_matrix = layer.is_new_rows or block.is_new_rows
        if other_layout != slot.layout and not of_one_matrix:
            yield f"another adapter has it with the layout {other_layout}, not {slot.layout}"
    if slot.quantized:
        yield from _reasons_against_quantized(layer, slot)
    else:
        yield from _reasons_against_dense(read_weight(module, layer.attribute), slot)
    if slot.output_ranges:
        outputs = slot.layout.geometry(layer.shape).out_features
        last = slot.output_ranges[-1]
        if last[1] > outputs:
            yield f"rows {last} are out of range: it has {outputs} rows"


def _find_clashing_names(module: nn.Module) -> set[str]:
    """Return the names of the module's own attributes that adapting would replace."""
    # A property counts by its presence on the class: asking for its value may read W.
    held = {*vars(module), *module._parameters, *module._buffers, *module._modules}
    return {name for name in ADDED_NAMES if name in held or hasattr(type(module), name)}


def _list_other_blocks(layer: PlannedLayer) -> Iterator[AdapterBlock]:
    """Yield the blocks that other adapters have for the weight, also where it is tied."""
    for holder, parameter in (layer.place, *layer.tied.values()):
        if isinstance(holder, AdaptedLayer):
            yield from holder.disha.blocks_for(parameter, holder.disha)


def _reasons_against_quantized(layer: PlannedLayer, slot: Slot) -> Iterator[str]:
    quantization = quantization_of(layer.module, stored_weight(layer.module, slot.parameter))
    if quantization is None:
        return
    if layer.is_new_rows:
        yield f"its weight is quantised ({quantization.name}); only dense ones get new rows"
    if layer.method.reads_weight and quantization.read is None:
        others = method_names(lambda other: not other.reads_weight)
        yield (
            f"its weight is quantised ({quantization.name}) and can't be read as numbers, as "
            f"method {layer.method.name!r} requires; use {others}"
        )


def _reasons_against_dense(weight: Any, slot: Slot) -> Iterator[str]:
    if is_lazy(weight):
        yield "its weight is not initialised yet; run the model once before injecting"
    # Any such dtype will do: a user's hook may cast the weight before each forward.
    if not isinstance(weight, Tensor) or not is_inexact(weight):
        yield "its weight is not a tensor of floating-point or complex numbers"
    if weight.layout is not torch.strided or isinstance(weight, SparseSemiStructuredTensor):
        yield "its weight is sparse; store it as a dense tensor (Tensor.to_dense)"
    shape = whole_shape(weight)
    if not shape.numel():
        yield "its weight is empty"
    split = split_of(weight)
    if split is not None and split.reason is not None:
        yield split.reason
    reason = slot.layout.reason_against_shape(shape)
    if reason is not None:
        yield reason


# --- against a block of some size ----------------------------------------------------------------


def reason_against_block(layer: PlannedLayer) -> str | None:
    """Return why the weight can't have a block of the planned size."""
    slot = layer.slot
    config = layer.config
    assert slot is not None
    reason = layer.method.reason_against(slot.layout, layer.geometry, layer.r, config.r_out)
    if reason is not None or slot.quantized or layer.is_new_rows:
        return reason
    split = split_of(read_weight(layer.module, layer.attribute))
    if split is None:
        return None
    placed = f"its weight is a DTensor placed as {split.placements}"
    if config.dropout:
        return f"{placed}, and each rank would drop different inputs of it; use dropout=0"
    block = torch.empty(layer.block_shape, device="meta")
    update = Update(layer.method, block, output_ranges=slot.output_ranges)
    for part in split.parts:
        if update_of_part(update, slot.layout, layer.shape, part) is None:
            ends = " and ".join(f"{first}:{stop}" for first, stop in part)
            return (
                f"{placed}, and a {config.method!r} block of r={layer.r} can't be cut at the edges "
                f"of a rank's part ({ends}); choose an r that divides these, or another method"
            )
    return None


# --- against what a file describes ---------------------------------------------------------------


def reason_against_record(
    layer: PlannedLayer, record: LayerRecord, block_shape: tuple[int, ...]
) -> str | None:
    """Return why the weight can't be adapted as a file describes it, with a block of that shape."""
    reason = record.reason_against_block(block_shape)
    if reason is not None:
        return reason
    reason = reason_against_adapting(layer)
    if reason is not None:
        return f"can't be adapted: {reason}"
    assert layer.slot is not None  # else there is a reason
    if layer.values is not None and not layer.slot.quantized:
        weight = read_weight(layer.module, layer.attribute)
        if layer.values.is_complex() != weight.is_complex():
            return "of its block and the weight in the model, one is complex and the other real"
    if set(layer.tied) != set(record.tied):
        return f"in the adapter, its weight is also {', '.join(record.tied)}; tie them"
    if record.layout != layer.slot.layout:
        return f"expected the layout {record.layout}, found {layer.slot.layout} in the model"
    reason = record.reason_against_weight(block_shape, layer.shape)
    if reason is not None:
        return reason
    return reason_against_block(layer)


# --- against training a parameter or a buffer ----------------------------------------------------


def reason_against_claiming(tensor: ModelParameter | ModelBuffer) -> str | None:
    """Return why the parameter can't be trained, or the buffer be saved, with a new adapter."""
    if tensor.claimant is not None:
        return "it is already trained with another adapter, and can belong to only one"
    if isinstance(tensor, ModelBuffer):
        return None
    if quantization_of(None, tensor.value) is not None:
        return "it is quantised and can't be trained with an adapter"
    if tensor.value.dtype not in TRAINABLE_DTYPES:
        return f"it has dtype {tensor.value.dtype} and can't be trained with an adapter"
    return None


def reason_against_loading(
    tensor: ModelParameter | ModelBuffer | None, shape: tuple[int, ...]
) -> str | None:
    """Return why a parameter or buffer can't belong to an adapter whose file has it so shaped."""
    if tensor is None:
        return "the model has no such parameter"
    if isinstance(tensor, ModelParameter):
        current = None if is_lazy(tensor.value) else tuple(whole_shape(tensor.value))
        if current != shape:
            return f"expected shape {tuple(shape)}, found {current} in the model"
    return reason_against_claiming(tensor)
