"""Make new blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from disha.config import AdapterConfig
from disha.effective.tensor_parallel import cut_like
from disha.functional import Update
from disha.functional.shard_sums import merge_dtype
from disha.layers import quantized
from disha.layers.blocks import AdapterBlock, NewRowsBlock
from disha.layers.offloading import device_in_forward
from disha.layers.spec import BlockSpec
from disha.layers.weights import read_weight, start_block
from disha.sharding.tensor_parallel import Split, split_of, whole_on
from disha.sharding.tensors import write


def make_block(
    module: nn.Module,
    spec: BlockSpec,
    config: AdapterConfig,
    values: Tensor | None = None,
    mesh: Any = None,
) -> AdapterBlock:
    """Return a new block on the device of its weight, with these values or those it starts with.

    If the model has DTensors, they are on `mesh`. Then each block is one too: torch clips the
    gradients of DTensors and of plain tensors only apart.
    """
    weight: Any = None if spec.quantized else read_weight(module, spec.parameter)
    if values is not None:
        dtype = values.dtype
    elif spec.is_new_rows:
        dtype = _choose_dtype(weight, None)  # which holds every value of W
    else:
        dtype = _choose_dtype(weight, config.dtype)
    device = _find_device(module, weight)
    with torch.inference_mode(False):  # a tensor that is made in that mode can never be trained
        split = split_of(weight) or whole_on(mesh, weight)
        if split is None:
            empty = torch.empty(spec.block_shape, device=device, dtype=dtype)
        else:
            of_block = split_of_block(split, spec)
            sizes = [stop - start for start, stop in of_block.part]
            empty = of_block.make_whole(torch.empty(sizes, device=device, dtype=dtype))
        cls = NewRowsBlock if spec.is_new_rows else AdapterBlock
        block = cls(empty, spec, config, split)
    if values is None:
        start_block(module, block)
    else:
        write(block.block, values)
    return block


def split_of_block(split: Split, spec: BlockSpec) -> Split:
    """Return how the block of a weight is cut that is cut so."""
    values = torch.empty(spec.block_shape, device="meta")
    return cut_like(
        split, Update(spec.method_of_block, values, output_ranges=spec.outputs), spec.layout
    )


def _find_device(module: nn.Module, weight: Tensor | None) -> torch.device | None:
    """Return the device of a weight, or that of the module if the weight is quantised (None)."""
    if weight is None:
        return quantized.device_of(module)
    if weight.is_meta:  # accelerate may load it to a device for each forward
        return device_in_forward(module, weight.device)
    return weight.device


def _choose_dtype(weight: Tensor | None, chosen: torch.dtype | None) -> torch.dtype:
    """Return the dtype of a new block: the chosen one, or else one with all digits of the sums."""
    if weight is not None and weight.is_complex():
        return torch.complex64  # a safetensors file has no complex128
    if chosen is not None:
        return chosen
    return torch.float32 if weight is None else merge_dtype(weight.dtype)
