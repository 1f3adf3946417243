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
    """Return the update of the outputs of a linear weight that indices choose.

    Only outputs in the ranges have one; others get zeros.
    `delta` (rows, in) has a row for each of these outputs, one range after another.
    """
    # Row 0 of the table is zeros; row k + 1 belongs to output numbers[k]. An index equal to none of
    # them finds row 0, because argmax of all zeros is 0.
    table = F.pad(delta, (0, 0, 1, 0))
    no_index = indices.new_full((1,), -1)
    numbers = output_numbers(ranges, indices.device)
    is_row = indices.unsqueeze(-1) == torch.cat([no_index, numbers])  # (..., 1 + rows)
    row_of_index = is_row.int().argmax(-1)
    return F.embedding(row_of_index, table)


def output_numbers(ranges: OutputRanges, device: torch.device) -> Tensor:
    """Return the numbers of all outputs in ranges."""
    return torch.cat([torch.arange(first, stop, device=device) for first, stop in ranges])
