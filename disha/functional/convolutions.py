"""Convolutions: the shard sums of their channels, for a smaller convolution with r channels."""

from __future__ import annotations

import torch
from torch import Tensor

from disha.functional.layouts import Geometry, Layout
from disha.functional.shard_sums import overflow_safe_shard_sum


def overflow_safe_channel_sum(
    x: Tensor, r: int, layout: Layout, geometry: Geometry
) -> tuple[Tensor, float]:
    """Return `overflow_safe_shard_sum` of the channels of x (..., channels, *positions).

    Each group of the convolution has its own channels, so the sums are (..., groups * r,
    *positions).
    """
    kernel_axes = len(geometry.stack)
    if layout.in_first:
        kernel_axes -= 1  # a transposed convolution, whose stack has an axis of groups too
    dim = -1 - kernel_axes  # behind the channels, x has an axis of positions for each of these
    groups = x.shape[dim] // geometry.in_features
    if groups > 1:
        x = torch.unflatten(x, dim, (groups, -1))
    sums, overflow_scale = overflow_safe_shard_sum(x, r, dim)
    if groups > 1:
        sums = torch.flatten(sums, dim - 1, dim)
    return sums, overflow_scale
