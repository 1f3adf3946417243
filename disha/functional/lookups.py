"""Lookups: what updates add to the rows of a table that indices choose.

A lookup is the product with a one-hot input. Its shard sum is one-hot as well, at (index mod r).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from disha.functional.layouts import OutputRanges
from disha.functional.shard_sums import is_inexact


def is_lookup(x: Tensor) -> bool:
    """Whether an input has indices, so that its product is a lookup."""
    return not is_inexact(x)


def look_up_outputs(indices: Tensor, delta: Tensor, ranges: OutputRanges) -> Tensor:
    """Look up outputs of a linear weight, of which only those in ranges have an update.

    `delta` (rows, in) has a row for each of these outputs, one range after another.
    """
    numbers = output_numbers(ranges, indices.device)
    no_index = indices.new_full((1,), -1)
    is_row = indices.unsqueeze(-1) == torch.cat([no_index, numbers])  # (..., 1 + rows)
    # An index outside of the ranges equals none of them, so it looks up row 0, which has zeros.
    return F.embedding(is_row.int().argmax(-1), F.pad(delta, (0, 0, 1, 0)))


def output_numbers(ranges: OutputRanges, device: torch.device) -> Tensor:
    """Return the numbers of all outputs in ranges."""
    return torch.cat([torch.arange(first, stop, device=device) for first, stop in ranges])
