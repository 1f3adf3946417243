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
    return not x.is_floating_point() and not x.is_complex()


def drop_tokens(output: Tensor, dropout: float) -> Tensor:
    """Zero the update of some tokens: the effect of dropout on a one-hot input."""
    if not dropout:
        return output
    return output * F.dropout(torch.ones_like(output[..., :1]), dropout)


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
