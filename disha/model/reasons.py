"""Why a weight can't have a block, or a parameter can't be trained with an adapter.

`reason_against` is asked for each spec, from a target or from a file. Each public function returns
the reason, or None if there is none.
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
from disha.layers.blocks import AdapterBlock
from disha.layers.quantized import quantization_of
from disha.layers.spec import BlockSpec
from disha.layers.weights import read_weight, stored_weight
from disha.model.found import ModelTensor
from disha.model.view import ModelView
from disha.sharding.tensor_parallel import split_of
from disha.sharding.zero import whole_shape

ADDED_NAMES = ("disha", "base_weight", "delta_weight")
"""The public names that adapting adds to a module."""


# --- against a block -----------------------------------------------------------------------------


def reason_against(view: ModelView, spec: BlockSpec) -> str | None:
    """Return why the method can't adapt the weight, whatever the size of the block."""
    return next(_reasons_against(view, spec), None)


def _reasons_against(view: ModelView, spec: BlockSpec) -> Iterator[str]:
    """Yield the reason; what follows it may not hold, so only the first one counts."""
    module = view.modules[spec.module]
    if not spec.parameter:
        yield f"no layer kind adapts {type(module).__qualname__}"
    if spec.reason_against_layout is not None:
        yield spec.reason_against_layout
    clashes = _find_clashing_names(module) - {spec.parameter}
    if clashes and not isinstance(module, AdaptedLayer):
        yield f"it has its own attribute {min(clashes)!r}, which adapters would replace"
    for block in _list_other_blocks(view, spec):
        other_layout = block.spec.layout
        of_one_matrix = spec.is_new_rows or block.is_new_rows
        if other_layout != spec.layout and not of_one_matrix:
            yield f"another adapter has it with the layout {other_layout}, not {spec.layout}"
    if spec.quantized:
        yield from _reasons_against_quantized(module, spec)
    else:
        yield from _reasons_against_dense(read_weight(module, spec.parameter), spec)
    if spec.outputs:
        outputs = spec.layout.geometry(spec.shape).out_features
        last = spec.outputs[-1]
        if last[1] > outputs:
            yield f"rows {last} are out of range: it has {outputs} rows"


def _find_clashing_names(module: nn.Module) -> set[str]:
    """Return the names of the module's own attributes that adapting would replace."""
    # A property counts by its presence on the class: asking for its value may read W.
    held = {*vars(module), *module._parameters, *module._buffers, *module._modules}
    return {name for name in ADDED_NAMES if name in held or hasattr(type(module), name)}


def _list_other_blocks(view: ModelView, spec: BlockSpec) -> Iterator[AdapterBlock]:
    """Yield the blocks that other adapters have for the weight, also where it is tied."""
    for name, parameter in spec.slots:
        holder = view.modules[name]
        if isinstance(holder, AdaptedLayer):
            yield from holder.disha.blocks_for(parameter, holder.disha)


def _reasons_against_quantized(module: nn.Module, spec: BlockSpec) -> Iterator[str]:
    quantization = quantization_of(module, stored_weight(module, spec.parameter))
    if quantization is None:
        return
    if spec.is_new_rows:
        yield f"its weight is quantised ({quantization.name}); only dense ones get new rows"
    if spec.method_of_block.reads_weight and quantization.read is None:
        others = method_names(lambda other: not other.reads_weight)
        yield (
            f"its weight is quantised ({quantization.name}) and can't be read as numbers, as "
            f"method {spec.method!r} requires; use {others}"
        )


def _reasons_against_dense(weight: Any, spec: BlockSpec) -> Iterator[str]:
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
    reason = spec.layout.reason_against_shape(shape)
    if reason is not None:
        yield reason


def reason_against_size(view: ModelView, spec: BlockSpec) -> str | None:
    """Return why the weight can't have a block of this size."""
    reason = spec.reason_against_r()
    if reason is not None or spec.quantized or spec.is_new_rows:
        return reason
    split = split_of(read_weight(view.modules[spec.module], spec.parameter))
    if split is None:
        return None
    block = torch.empty(spec.block_shape, device="meta")
    update = Update(spec.method_of_block, block, output_ranges=spec.outputs)
    for part in split.parts:
        if update_of_part(update, spec.layout, spec.shape, part) is None:
            ends = " and ".join(f"{first}:{stop}" for first, stop in part)
            return (
                f"its weight is a DTensor placed as {split.placements}, and a {spec.method!r} "
                f"block of r={spec.r} can't be cut at the edges of a rank's part ({ends}); choose "
                "an r that divides these, or another method"
            )
    return None


def reason_against_file(
    view: ModelView, spec: BlockSpec, in_file: BlockSpec, values: Tensor
) -> str | None:
    """Return why a weight of the model can't have the block that a file describes."""
    reason = in_file.reason_against_block(values.shape)
    if reason is not None:
        return reason
    reason = reason_against(view, spec)
    if reason is not None:
        return f"can't be adapted: {reason}"
    if not spec.quantized:
        weight = read_weight(view.modules[spec.module], spec.parameter)
        if values.is_complex() != weight.is_complex():
            return "of its block and the weight in the model, one is complex and the other real"
    if set(spec.tied) != set(in_file.tied):
        return f"in the adapter, its weight is also {', '.join(in_file.tied)}; tie them"
    if in_file.layout != spec.layout:
        return f"expected the layout {in_file.layout}, found {spec.layout} in the model"
    reason = in_file.reason_against_shape(spec.shape)
    if reason is not None:
        return reason
    return reason_against_size(view, spec)


# --- against training a parameter or a buffer ----------------------------------------------------


def reason_against_claiming(tensor: ModelTensor) -> str | None:
    """Return why the parameter can't be trained, or the buffer be saved, with a new adapter."""
    if tensor.claimant is not None:
        return "it is already trained with another adapter, and can belong to only one"
    if tensor.table == "buffers":
        return None
    if quantization_of(None, tensor.value) is not None:
        return "it is quantised and can't be trained with an adapter"
    if tensor.value.dtype not in TRAINABLE_DTYPES:
        return f"it has dtype {tensor.value.dtype} and can't be trained with an adapter"
    return None


def reason_against_loading(tensor: ModelTensor | None, shape: tuple[int, ...]) -> str | None:
    """Return why a parameter or buffer can't belong to an adapter whose file has it so shaped."""
    if tensor is None:
        return "the model has no such parameter"
    if tensor.table == "flags":
        current = None if is_lazy(tensor.value) else tuple(whole_shape(tensor.value))
        if current != shape:
            return f"expected shape {tuple(shape)}, found {current} in the model"
    return reason_against_claiming(tensor)
