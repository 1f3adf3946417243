"""Check that a model returns the same while its adapters are merged."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn

from disha.errors import DishaError
from disha.layers.adapted import AdaptedLayer
from disha.model.check_runs import Runner, dense_weights, sum_weights
from disha.model.found import ModelBlock
from disha.model.merge import merge, refuse_sharded
from disha.model.view import ModelView
from disha.sharding.tensors import gather, write

LARGEST_PART = 64 * 2**20

ROUNDINGS = 4
"""Merging may change an output by this many times as much as a tiny change of the blocks does."""


DRIFTS = (
    "each forward changes this weight, as `weight.data = weight.data.clone()` would, so its update "
    "is added again and again; read and write layer.base_weight there"
)
"""The reason against a weight that every forward changes."""


class Merging(NamedTuple):
    """Whether the outputs stay the same when a layer is merged."""

    keeps_outputs: bool | None  # None if merging is refused
    reason: str = ""  # why they do not, or why it is refused; else empty


def compare_merged(
    view: ModelView,
    runner: Runner,
    compared: list[ModelBlock],
    expected: list[Tensor],
) -> dict[AdaptedLayer, Merging]:
    """Return for each layer of the compared blocks whether it can be merged.

    `expected` are the outputs of the model in evaluation mode, unmerged.
    """
    try:
        borrowers = view.find_borrowers()
        refuse_sharded(view, "merge adapters")  # before a forward that no backward would follow
    except DishaError as error:
        return _refuse_all(compared, error)
    # A layer merges together with those that are tied to it.
    together: dict[AdaptedLayer, set[nn.Module]] = {
        model_block.layer: {model_block.layer} for model_block in compared
    }
    for model_block in compared:
        together[model_block.layer].update(borrowers[model_block.block].values())
    tolerance = find_tolerance([*expected, *dense_weights(compared).values()])
    sums_before = sum_weights(compared)
    allowed = _measure_rounding(runner, expected, tolerance)  # runs the model once
    sums_after = sum_weights(compared)

    def find_difference(layers: Iterable[AdaptedLayer]) -> str:
        only = set[nn.Module]().union(*[together[layer] for layer in layers])
        with ExitStack() as undo:
            merge(view, undo, only=only)
            outputs = runner.run(training=False)
        return describe_difference(outputs, expected, tolerance, allowed)

    mergings: dict[AdaptedLayer, Merging] = {}
    try:
        for part in _split_by_size(compared):
            alike = not find_difference(part)
            for layer in part:
                # If they differ together, each is merged alone, to find those that do.
                difference = "" if alike else find_difference([layer])
                mergings[layer] = Merging(not difference, difference)
    except DishaError as error:
        return _refuse_all(compared, error)
    for model_block in compared:
        if sums_before.get(model_block.block) != sums_after.get(model_block.block):
            mergings[model_block.layer] = Merging(False, DRIFTS)
    return mergings


def _refuse_all(compared: list[ModelBlock], error: DishaError) -> dict[AdaptedLayer, Merging]:
    refused = Merging(None, str(error))
    return {model_block.layer: refused for model_block in compared}


def _split_by_size(compared: list[ModelBlock]) -> list[list[AdaptedLayer]]:
    """Return the layers in parts that merge together, because their originals are kept meanwhile.

    A part has at most `LARGEST_PART` bytes, or a 16th of all weights, or a single layer.
    """
    sizes = dict.fromkeys([model_block.layer for model_block in compared], 0)
    weights = dense_weights(compared)
    for model_block in compared:
        if model_block.block in weights:
            sizes[model_block.layer] += weights[model_block.block].nbytes
    limit = max(LARGEST_PART, sum(sizes.values()) // 16)
    parts: list[list[AdaptedLayer]] = [[]]
    free = limit
    for layer, size in sizes.items():
        if size > free and parts[-1]:
            parts.append([])
            free = limit
        parts[-1].append(layer)
        free -= size
    return parts


def find_tolerance(tensors: Iterable[Tensor]) -> float:
    """Return the square root of the largest rounding step of the dtypes of tensors."""
    return max(torch.finfo(tensor.dtype).eps for tensor in tensors) ** 0.5


def _measure_rounding(runner: Runner, expected: list[Tensor], tolerance: float) -> list[float]:
    """Return for each output by how much it may differ when weights are rounded in another way.

    This is measured: all blocks change by the relative `tolerance`, and the outputs show how much
    that matters. So the result is small for small outputs, but not if large numbers cancel out in
    them.
    """
    with ExitStack() as undo:
        for block in runner.blocks:
            write(block.block, gather(block.block) * (1 + tolerance), undo)
        outputs = runner.run(training=False)
    if _shapes_of(outputs) != _shapes_of(expected):
        return [0.0] * len(expected)
    return [ROUNDINGS * _find_largest(output - former) for output, former in zip(outputs, expected)]


def describe_difference(
    outputs: list[Tensor], expected: list[Tensor], tolerance: float, allowed: list[float]
) -> str:
    """Return how merged outputs differ from the expected ones; empty if only by rounding."""
    if _shapes_of(outputs) != _shapes_of(expected):
        return "merged, the model returns other tensors, or tensors of other shapes"
    for output, former, limit in zip(outputs, expected, allowed):
        output = output.to(former)
        if not torch.allclose(output, former, rtol=tolerance, atol=limit, equal_nan=True):
            difference = _find_largest(output - former)
            return (
                f"merged, an output differs by up to {difference:.2g}, where its values reach "
                f"{_find_largest(former):.2g}: the model does something else when its weights are "
                "plain"
            )
    return ""


def _shapes_of(tensors: list[Tensor]) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors]


def _find_largest(tensor: Tensor) -> float:
    """Return the largest finite magnitude in a tensor, or 0 if it has none."""
    finite = tensor[tensor.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0
