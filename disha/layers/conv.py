"""Adapted convolutions, plain and transposed: y = conv(x, W) + sum of s conv(S(x), D).

The second convolution has the stride, padding, dilation, groups and padding mode of the first.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disha import functional
from disha.layers.adapted import AdaptedLayer, Geometry
from disha.layers.blocks import Block

__all__ = [
    "CONV_KINDS",
    "AdaptedConv1d",
    "AdaptedConv2d",
    "AdaptedConv3d",
    "AdaptedConvTranspose1d",
    "AdaptedConvTranspose2d",
    "AdaptedConvTranspose3d",
]

PlainConv = nn.Conv1d | nn.Conv2d | nn.Conv3d
TransposedConv = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


class _Conv(AdaptedLayer):
    """What plain and transposed convolutions share."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    groups: int

    @classmethod
    def misfit(cls, geometry: Geometry, r: int, r_out: int | None) -> str | None:
        """Return why blocks of these sizes don't fit a layer of that geometry, or None."""
        if r > geometry.in_features:
            return f"r={r} is larger than its {geometry.in_features} input channels per group"
        if r_out is not None and geometry.out_features % r_out:
            return f"r_out={r_out} does not divide its {geometry.out_features} output channels"
        return None

    @classmethod
    def has_samples(cls, module: nn.Module, input: Tensor) -> bool:
        """Return whether the input has a batch dimension before its channels."""
        return input.dim() == len(cast(PlainConv, module).kernel_size) + 2

    @classmethod
    def example_input(cls, module: nn.Module, generator: torch.Generator) -> Tensor:
        """Return a small random input, larger than the kernel and any sensible padding."""
        conv = cast(PlainConv, module)
        spans = zip(conv.kernel_size, conv.dilation, strict=True)
        positions = [2 * dilation * kernel + 2 for kernel, dilation in spans]
        return torch.randn(2, conv.in_channels, *positions, generator=generator)

    def _shard_sum(self, block: Block, input: Tensor) -> Tensor:
        sums = functional.channel_shard_sum(
            block.dropped(input),
            block.r,
            self.groups,
            spatial=len(self.kernel_size),
            dtype=block.block.dtype,
        )
        return sums * block.current_scale()


class _AdaptedConv(_Conv):
    """Conv1d, Conv2d and Conv3d: W (out, in_g, *kernel), D (out, r, *kernel)."""

    weight_layout = "conv"
    shard_dim = 1

    @classmethod
    def geometry(cls, module: nn.Module) -> Geometry:
        """Return the input channels of one group, and all output channels."""
        conv = cast(PlainConv, module)
        return Geometry(conv.in_channels // conv.groups, conv.out_channels)

    @classmethod
    def block_shape(
        cls, module: nn.Module, method: str, r: int, r_out: int | None
    ) -> tuple[int, ...]:
        """Return (out, r, *kernel), or (r_out, r, *kernel) for a tile."""
        conv = cast(PlainConv, module)
        return (conv.out_channels if r_out is None else r_out, r, *conv.kernel_size)

    def delta_weight(self, block: Block) -> Tensor:
        """Return dW (out, in_g, *kernel) of a block, without its scale."""
        return functional.conv_delta_weight(
            block.block, self.in_channels // self.groups, self.out_channels
        )

    def delta_output(self, block: Block, input: Tensor, *more: Any) -> Tensor:
        """Return what a block adds to the output for `input` (..., in, *positions), scaled."""
        whole = functional.whole_block(block.block, self.out_channels, dim=0)
        conv = cast(PlainConv, self)
        output: Tensor = conv._conv_forward(self._shard_sum(block, input), whole, None)
        return output

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of `input` (..., in, *positions), adapters applied."""
        return self.updated_in_place(super().forward(input), self.disha.acting(), input)


class _AdaptedConvTranspose(_Conv):
    """The transposed ones: W (in, out_g, *kernel), D (groups * r, out_g, *kernel)."""

    weight_layout = "conv_transposed"

    @classmethod
    def geometry(cls, module: nn.Module) -> Geometry:
        """Return the input and output channels of one group."""
        conv = cast(TransposedConv, module)
        return Geometry(conv.in_channels // conv.groups, conv.out_channels // conv.groups)

    @classmethod
    def block_shape(
        cls, module: nn.Module, method: str, r: int, r_out: int | None
    ) -> tuple[int, ...]:
        """Return (groups * r, out_g, *kernel), or r_out in place of out_g for a tile."""
        conv = cast(TransposedConv, module)
        out_features = conv.out_channels // conv.groups
        return (conv.groups * r, out_features if r_out is None else r_out, *conv.kernel_size)

    def delta_weight(self, block: Block) -> Tensor:
        """Return dW (in, out_g, *kernel) of a block, without its scale."""
        geometry = self.geometry(self)
        return functional.conv_transpose_delta_weight(
            block.block, geometry.in_features, geometry.out_features, self.groups
        )

    def delta_output(self, block: Block, input: Tensor, *more: Any) -> Tensor:
        """Return what a block adds to the output for `input` (..., in, *positions), scaled.

        `more` may hold the output_size of the call.
        """
        output_size: list[int] | None = more[0] if more else None
        whole = functional.whole_block(block.block, self.out_channels // self.groups, dim=1)
        conv, spatial = cast(TransposedConv, self), len(self.kernel_size)
        padding = conv._output_padding(
            input,
            output_size,
            list(conv.stride),
            cast(list[int], list(conv.padding)),
            list(conv.kernel_size),
            spatial,
            list(conv.dilation),
        )
        transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial - 1]
        return transposed(
            self._shard_sum(block, input),
            whole,
            None,
            conv.stride,
            cast(tuple[int, ...], conv.padding),
            padding,
            conv.groups,
            conv.dilation,
        )

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return the transposed convolution of `input`, adapters applied."""
        output: Tensor = super().forward(input, output_size)
        return self.updated_in_place(output, self.disha.acting(), input, output_size)


class AdaptedConv1d(_AdaptedConv, nn.Conv1d):
    """An `nn.Conv1d` with adapters."""

    base_class = original_class = nn.Conv1d


class AdaptedConv2d(_AdaptedConv, nn.Conv2d):
    """An `nn.Conv2d` with adapters."""

    base_class = original_class = nn.Conv2d


class AdaptedConv3d(_AdaptedConv, nn.Conv3d):
    """An `nn.Conv3d` with adapters."""

    base_class = original_class = nn.Conv3d


class AdaptedConvTranspose1d(_AdaptedConvTranspose, nn.ConvTranspose1d):
    """An `nn.ConvTranspose1d` with adapters."""

    base_class = original_class = nn.ConvTranspose1d


class AdaptedConvTranspose2d(_AdaptedConvTranspose, nn.ConvTranspose2d):
    """An `nn.ConvTranspose2d` with adapters."""

    base_class = original_class = nn.ConvTranspose2d


class AdaptedConvTranspose3d(_AdaptedConvTranspose, nn.ConvTranspose3d):
    """An `nn.ConvTranspose3d` with adapters."""

    base_class = original_class = nn.ConvTranspose3d


CONV_KINDS: tuple[type[AdaptedLayer], ...] = (
    AdaptedConv1d,
    AdaptedConv2d,
    AdaptedConv3d,
    AdaptedConvTranspose1d,
    AdaptedConvTranspose2d,
    AdaptedConvTranspose3d,
)
for _kind in CONV_KINDS:
    _kind.layer_kind = _kind
