"""What an adapter's block does to a weight, away from any module: by the layout of the weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from disha import functional
from disha.files.header import LayerRecord
from disha.layers.blocks import Bat

__all__ = ["misfit", "updated"]

Shape = tuple[int, ...]


def misfit(record: LayerRecord, block: Shape, weight: Shape, packed: bool) -> str | None:
    """Return why a layer's weight can't be the one in a checkpoint, or None if it can.

    Args:
        record: what the adapter file says of the layer; without a layout anything may fit.
        block: the block's shape, which is as the record says: reading the file has checked it.
        weight: the shape of the tensor that holds the weight.
        packed: whether it holds those of q, k and v below each other.
    """
    if packed and not weight:
        return "the tensor there is a single number"
    if record.layout is None:
        return None
    expected = _weight_shape(record, block)
    if packed:
        expected = (3 * expected[0], *expected[1:])
    if weight != expected:
        return f"the weight there is {weight}, and the adapter is for {expected}"
    return None


def _weight_shape(record: LayerRecord, block: Shape) -> Shape:
    """Return the shape of a layer's weight; a kernel, and groups, are the block's."""
    inputs, outputs, kernel = record.in_features, record.out_features, block[2:]
    if record.layout == "conv":
        return (outputs, inputs, *kernel)
    if record.layout == "conv_transposed":
        return (_groups(record, block) * inputs, outputs, *kernel)
    return (outputs, inputs) if record.layout == "linear" else (inputs, outputs)


def _groups(record: LayerRecord, block: Sequence[int]) -> int:
    return block[0] // record.r


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
