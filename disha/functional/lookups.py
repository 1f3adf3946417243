"""Lookups in a table, whose rows indices choose.

A lookup is the product with a one-hot input. Its shard sum is one-hot as well, at (index mod r).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from disha.functional.layouts import OutputRanges
from disha.functional.shard_sums import tiled


def is_lookup(x: Tensor) -> bool:
    """Whether an input has indices, so that its product is a lookup."""
    return not (x.is_floating_point() or x.is_complex())  # `is_inexact`, without its call


def look_up_columns(indices: Tensor, down: int | Tensor, up: Tensor, out_features: int) -> Tensor:
    """Return R^T of the columns of A that indices choose, as (..., out); R may be a tile."""
    if isinstance(down, int):  # a column of [I_k I_k ... I_k] chooses a row of R
        return F.embedding(indices % down, tiled(up, out_features))
    return F.embedding(indices, down.mT) @ up


def output_numbers(ranges: OutputRanges, device: torch.device) -> Tensor:
    """Return the numbers of all outputs in ranges."""
    return torch.cat([torch.arange(first, stop, device=device) for first, stop in ranges])
