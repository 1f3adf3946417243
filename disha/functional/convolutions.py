"""Convolutions: how the channels of an input go down, for a smaller convolution, and up again."""

from __future__ import annotations

import torch
from torch import Tensor

from disha.functional.layouts import Geometry, Layout
from disha.functional.shard_sums import overflow_safe_shard_sum


def overflow_safe_channel_sum(x: Tensor, r: int, geometry: Geometry) -> tuple[Tensor, float]:
    """Return `overflow_safe_shard_sum` of the channels of x (..., channels, *positions).

    Each group of the convolution has its own channels, so the sums are (..., conv_groups * r,
    *positions).
    """
    dim = -1 - geometry.kernel_axes  # behind the channels, x has an axis of positions for each
    conv_groups = x.shape[dim] // geometry.in_features
    if conv_groups > 1:
        x = torch.unflatten(x, dim, (conv_groups, -1))
    sums, overflow_scale = overflow_safe_shard_sum(x, r, dim)
    if conv_groups > 1:
        sums = torch.flatten(sums, dim - 1, dim)
    return sums, overflow_scale


def repeat_for_conv_groups(down: Tensor, x: Tensor, layout: Layout, geometry: Geometry) -> Tensor:
    """Return A (*kernel, k, in) once for each group: (*kernel, conv_groups * k, in).

    A transposed convolution has an A for each group already, in its stack.
    """
    if layout.in_first:
        return down
    conv_groups = x.shape[-1 - geometry.kernel_axes] // geometry.in_features
    return torch.cat([down] * conv_groups, -2)


def mix_channels(sums: Tensor, up: Tensor, layout: Layout, geometry: Geometry) -> Tensor:
    """Return R^T of the channels (..., conv_groups * k, *positions) of A x, at each position.

    R is (*ones, k, out), or for a transposed convolution (conv_groups, *ones, k, out).
    """
    axes = geometry.kernel_axes
    k, outputs = up.shape[-2:]
    positions = sums.shape[-axes:]
    sums = torch.unflatten(sums.flatten(-axes), -2, (-1, k))  # (..., conv_groups, k, n)
    if layout.in_first:
        matrices = up.reshape(-1, k, outputs)
    else:
        matrices = torch.unflatten(up.reshape(k, outputs), -1, (sums.shape[-3], -1)).transpose(0, 1)
    output = (matrices.mT @ sums).flatten(-3, -2)  # (..., conv_groups * out, n)
    return torch.unflatten(output, -1, positions)
