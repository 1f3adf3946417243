"""Lookups: what updates add to the rows of a table that indices choose.

A lookup is the product with a one-hot input. Its shard sum is one-hot as well, at (index mod r).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from disha.functional.layouts import OutputRanges


def is_lookup(x: Tensor) -> bool:
    """Whether an input has indices, so that its product is a lookup."""
    return not (x.is_floating_point() or x.is_complex())  # `is_inexact`, without its call


def look_up_outputs(indices: Tensor, delta: Tensor, ranges: OutputRanges) -> Tensor:
    """Return the rows of dW of a linear weight (out, in) that indices choose.

    `delta` (rows, in) has those of the outputs in the ranges, one range after another. The other
    outputs have no update, so their rows are zeros.
    """
    # Row 0 of the table is zeros, and row k + 1 is that of output numbers[k]. Any other output
    # finds row 0, because the argmax of nothing but zeros is 0.
    table = F.pad(delta, (0, 0, 1, 0))
    no_index = indices.new_full((1,), -1)
    numbers = output_numbers(ranges, indices.device)
    is_row = indices.unsqueeze(-1) == torch.cat([no_index, numbers])  # (..., 1 + rows)
    row_of_index = is_row.int().argmax(-1)
    return F.embedding(row_of_index, table)


def output_numbers(ranges: OutputRanges, device: torch.device) -> Tensor:
    """Return the numbers of all outputs in ranges."""
    return torch.cat([torch.arange(first, stop, device=device) for first, stop in ranges])
