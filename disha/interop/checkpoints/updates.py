"""What an adapter's block does to a weight, away from any module: by the layout of the weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from disha import functional
from disha.files.header import LayerRecord
from disha.layers.blocks import Bat

__all__ = ["misfit", "updated"]

LINEAR = ("linear", "linear_in_out")

Shape = tuple[int, ...]


def misfit(record: LayerRecord, block: Shape, weight: Shape, packed: bool) -> str | None:
    """Return why a block can't be one for a weight, or None if it can.

    Args:
        record: what the adapter file says of the layer; without a layout anything may fit.
        block: the block's shape.
        weight: the shape of the tensor that holds the weight.
        packed: whether it holds those of q, k and v below each other.
    """
    if packed and not weight:
        return "the tensor there is a single number"
    if record.layout is None:
        return None
    if record.method == Bat.method and record.layout not in LINEAR:
        return f"{record.method!r} adapts linear layers, and the file says {record.layout!r}"
    if record.method == Bat.method and record.r_out is not None:
        return f"{record.method!r} has no r_out, and the file says {record.r_out}"
    if record.r > record.in_features or record.out_features % (record.r_out or 1):
        return f"r={record.r} and r_out={record.r_out} don't fit {_sizes(record)}"
    expected, of_weight = _shapes(record, block)
    if block != expected:
        return f"its block is {block}, and has to be {expected} for r={record.r}, {_sizes(record)}"
    if packed:
        of_weight = (3 * of_weight[0], *of_weight[1:])
    if weight != of_weight:
        return f"the weight there is {weight}, and the adapter is for {of_weight}"
    return None


def _sizes(record: LayerRecord) -> str:
    return f"{record.in_features} -> {record.out_features}"


def _shapes(record: LayerRecord, block: Shape) -> tuple[Shape, Shape]:
    """Return the shapes of the block and of the weight; a kernel, and groups, are the block's."""
    r, inputs, outputs = record.r, record.in_features, record.out_features
    width, kernel = record.r_out or outputs, block[2:]
    if record.layout == "conv":
        return (width, r, *kernel), (outputs, inputs, *kernel)
    if record.layout == "conv_transposed":
        groups = _groups(record, block)
        return (groups * r, width, *kernel), (groups * inputs, outputs, *kernel)
    bat = (functional.shard_count(outputs, r), r, r)
    of_weight = (outputs, inputs) if record.layout == "linear" else (inputs, outputs)
    return bat if record.method == Bat.method else (r, width), of_weight


def _groups(record: LayerRecord, block: Sequence[int]) -> int:
    return max(block[0] // record.r, 1) if block else 1


def updated(record: LayerRecord, block: Tensor, weight: Tensor, scale: float) -> Tensor:
    """Return W + s * dW: exactly what `merge_adapters` computes before it rounds.

    Args:
        record: what the adapter file says of the layer; it has a layout.
        block: its block D, which fits.
        weight: W in float32, or in float64 where it is float64 in the checkpoint.
        scale: runtime scale s.
    """
    with functional.without_autocast(weight.device), torch.no_grad():
        return functional.merged_weight(weight, [(_delta_weight(record, block, weight), scale)])


def _delta_weight(record: LayerRecord, block: Tensor, weight: Tensor) -> Tensor:
    inputs, outputs = record.in_features, record.out_features
    if record.layout == "conv":
        return functional.conv_delta_weight(block, inputs, outputs)
    if record.layout == "conv_transposed":
        groups = _groups(record, block.shape)
        return functional.conv_transpose_delta_weight(block, inputs, outputs, groups)
    if record.layout == "embedding":
        return functional.embedding_delta_weight(block, inputs, outputs)
    transposed = record.layout == "linear_in_out"
    if record.method == Bat.method:
        delta = functional.bat_delta_weight(weight.T if transposed else weight, block)
    else:
        delta = functional.bone_delta_weight(block, inputs, outputs)
    return delta.T if transposed else delta
