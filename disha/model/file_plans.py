"""Plan an injection from what an adapter file says of its layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from disha.config import AdapterConfig
from disha.errors import ArgumentError
from disha.layers.spec import BlockSpec
from disha.model.plan import Plan
from disha.model.reasons import reason_against_file, reason_against_loading
from disha.model.selection import (
    Candidate,
    as_table,
    as_whole,
    find_layout_key,
    find_tied,
    list_candidates,
    list_nearest,
)
from disha.model.view import ModelView
from disha.text import WIDEST, brief, first_few, printable


def plan_weights(
    view: ModelView,
    adapter: str,
    config: AdapterConfig,
    layers: Collection[BlockSpec],
    tensors: Mapping[str, Tensor],
    also_train: Collection[str],
    *,
    freeze: bool,
) -> Plan:
    """Plan an adapter for the weights that a file names; raise one error with all reasons."""
    view.check_can_add(adapter)
    weights = _candidates_by_name(view)
    reasons = []
    planned = []
    for in_file in layers:
        name = printable(in_file.name, WIDEST) or "(the model)"
        if in_file.name not in weights:
            reasons.append(f"{name}: the model has no such layer")
            continue
        spec = _describe_as_in_file(view, weights[in_file.name], in_file, config)
        spec = spec.but(adapter=adapter)
        reason = reason_against_file(view, spec, in_file, tensors[in_file.key])
        if reason is None:
            planned.append(spec)
        else:
            reasons.append(f"{name}: {reason}")
    in_model = {name: tensor for tensor in view.tensors for name in tensor.names}
    for key in also_train:
        reason = reason_against_loading(in_model.get(key), tensors[key].shape)
        if reason is not None:
            reasons.append(f"parameter {printable(key, WIDEST)}: {reason}")
    if reasons:
        message = f"the adapter does not fit the model; nothing changed:\n{first_few(reasons, 20)}"
        absent = [spec.name for spec in layers if spec.name not in weights]
        saved_names = [name for name, weight in weights.items() if name in weight.names]
        nearest = list_nearest(absent[0], saved_names) if absent else ""
        if nearest:
            message += f"\nthe names nearest to {brief(absent[0])} are {nearest}"
        raise ArgumentError(message)
    # Statistics are saved with every adapter, so none claims them.
    claimed = tuple(key for key in also_train if not in_model[key].is_statistic)
    return Plan(adapter, config, freeze, tuple(planned), claimed)


def _candidates_by_name(view: ModelView) -> dict[str, Candidate]:
    """Return every weight of the model under all names that a file may have for it."""
    weights: dict[str, Candidate] = {}
    for candidate in list_candidates(view):
        for name in candidate.names_to_match:
            weights.setdefault(name, candidate)
    return weights


def _describe_as_in_file(
    view: ModelView, candidate: Candidate, in_file: BlockSpec, config: AdapterConfig
) -> BlockSpec:
    """Return a weight with the block and the outputs of the file, and its layout if none is known.

    A tied parameter that the file does not list has no update in the file, and gets none here.
    """
    if in_file.is_new_rows:
        candidate = as_table(candidate)
    spec = candidate.spec
    is_declared = not spec.has_layout or find_layout_key(candidate, config) is not None
    if is_declared and spec.parameter:
        spec = as_whole(candidate, in_file.layout)
    if spec.has_layout and in_file.outputs:
        spec = spec.but(outputs=in_file.outputs)
    tied = find_tied(view, spec)
    return spec.but(
        method=in_file.method,
        r=in_file.r,
        r_out=in_file.r_out,
        scale=in_file.scale,
        tied=tuple(name for name in in_file.tied if name in tied),
    )
