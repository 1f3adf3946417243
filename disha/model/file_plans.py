"""Plan an injection from what an adapter file says of its layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from disha.config import AdapterConfig
from disha.errors import ArgumentError
from disha.layers.kinds import slot_of
from disha.model.plan import Plan, PlannedLayer
from disha.model.reasons import reason_against_loading, reason_against_record
from disha.model.records import LayerRecord
from disha.model.selection import as_table, find_layout_key, find_tied, list_nearest, list_weights
from disha.model.view import ModelView
from disha.text import WIDEST, brief, first_few, printable


def plan_weights(
    view: ModelView,
    adapter: str,
    config: AdapterConfig,
    layers: Collection[LayerRecord],
    tensors: Mapping[str, Tensor],
    also_train: Collection[str],
    *,
    dtype: torch.dtype | None,
    freeze: bool,
) -> Plan:
    """Plan an adapter for the weights that a file names; raise one error with all reasons."""
    view.check_can_add(adapter)
    weights = _weights_by_name(view, config)
    reasons = []
    planned = []
    for record in layers:
        tensor = tensors[record.key]
        name = printable(record.name, WIDEST) or "(the model)"
        if record.name not in weights:
            reasons.append(f"{name}: the model has no such layer")
            continue
        values = tensor
        if dtype is not None and not tensor.is_complex() and not record.is_new_rows:
            values = tensor.to(dtype)
        layer = _plan_as_recorded(view, weights[record.name], record, config, values)
        reason = reason_against_record(layer, record, tensor.shape)
        if reason is None:
            planned.append(layer)
        else:
            reasons.append(f"{name}: {reason}")
    in_model = {name: tensor for tensor in view.tensors for name in tensor.names}
    for key in also_train:
        reason = reason_against_loading(in_model.get(key), tensors[key].shape)
        if reason is not None:
            reasons.append(f"parameter {printable(key, WIDEST)}: {reason}")
    if reasons:
        message = f"the adapter does not fit the model; nothing changed:\n{first_few(reasons, 20)}"
        absent = [record.name for record in layers if record.name not in weights]
        saved_names = [name for name, weight in weights.items() if name in weight.names]
        nearest = list_nearest(absent[0], saved_names) if absent else ""
        if nearest:
            message += f"\nthe names nearest to {brief(absent[0])} are {nearest}"
        raise ArgumentError(message)
    # Statistics are saved with every adapter, so none claims them.
    claimed = tuple(key for key in also_train if not in_model[key].is_statistic)
    return Plan(adapter, config, freeze, tuple(planned), claimed)


def _weights_by_name(view: ModelView, config: AdapterConfig) -> dict[str, PlannedLayer]:
    """Return every weight of the model under all names that a file may have for it."""
    weights: dict[str, PlannedLayer] = {}
    for layer in list_weights(view, config):
        for name in layer.names_to_match:
            weights.setdefault(name, layer)
    return weights


def _plan_as_recorded(
    view: ModelView,
    layer: PlannedLayer,
    record: LayerRecord,
    config: AdapterConfig,
    values: Tensor,
) -> PlannedLayer:
    """Return a weight with the block and the rows of the file, and its layout if none is known."""
    if record.is_new_rows:
        layer = as_table(layer)
    slot = layer.slot
    is_declared = slot is None or find_layout_key(layer, config) is not None
    if is_declared and layer.attribute:
        slot = slot_of(layer.attribute, record.layout)
    if slot is not None and record.rows:
        slot = replace(slot, output_ranges=record.rows)
    places = find_tied(view, layer)
    # A tied parameter that the file does not list has no update in the file, and gets none here.
    tied = {name: places[name] for name in record.tied if name in places}
    return replace(layer, slot=slot, config=config, r=record.r, values=values, tied=tied)
