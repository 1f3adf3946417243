"""Lookups in a table, whose rows indices choose.

A lookup is the product with a one-hot input. Its shard sum is one-hot as well, at (index mod r).
"""

from __future__ import annotations

import torch
from torch import Tensor

from disha.functional.layouts import OutputRanges


def is_lookup(x: Tensor) -> bool:
    """Whether an input has indices, so that its product is a lookup."""
    return not (x.is_floating_point() or x.is_complex())  # `is_inexact`, without its call


def output_numbers(ranges: OutputRanges, device: torch.device) -> Tensor:
    """Return the numbers of all outputs in ranges."""
    return torch.cat([torch.arange(first, stop, device=device) for first, stop in ranges])
