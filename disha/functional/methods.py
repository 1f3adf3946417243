"""The table: what every method does with every layout.

A method is defined on one matrix W (out, in) with n = ceil(in / r) shards of its inputs:

    method   block D                 update dW
    bone     (r, out)                dW[o, i] = D[i mod r, o]
    tile     (r, r_out)              dW[o, i] = D[i mod r, o mod r_out]: Bone with r_out
    bat      (ceil(out / r), r, r)   dW_ab = W_ab D_a + D_a for every r x r tile of W

A layout (`disha.functional.layouts`) says how a weight becomes a stack of such matrices. A block
then has the axes of the stack before its own. The functions below work for any method with any
layout: `block_shape`, `delta_weight`, `widened`, `lora_factors`. Layers, files, merging,
conversions and statistics call them and know no method by name.

To add a method: write a subclass of `Method`, and put an instance into `METHODS`.

Source: arXiv 2409.15371, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from disha.errors import ArgumentError
from disha.functional.bat import bat_delta_weight, bat_linear, bat_streamed
from disha.functional.bone import bone_delta_weight, bone_lora_factors
from disha.functional.layouts import Geometry, Layout, Rows, place_rows
from disha.functional.shards import (
    Scale,
    merge_dtype,
    scaled,
    shard_count,
    tiled,
    without_autocast,
)
from disha.text import brief

__all__ = [
    "METHODS",
    "Method",
    "block_shape",
    "delta_weight",
    "kept_block",
    "lora_factors",
    "matrix_block",
    "method_names",
    "method_of",
    "misfit",
    "stack_of",
    "widened",
]


class Method:
    """What one method does with one matrix W (out, in), or with a stack of them.

    `shape` returns the shape of a method's block, and `delta` its update. A method that `reduces`
    may define `reduced` instead of `delta`. Everything else has a default that is correct for any
    method. Override it where the method can do more, or do it at a lower cost. Set `block_axes`,
    `reads_weight` and `additive` as the formula of dW says.

    Attributes:
        name: its name in configurations and files.
        aliases: other names that users may give it.
        block_axes: number of axes of the block of one matrix. With two of them, the block (r, out)
            of a convolution is kept as a small weight, with r in the place of `in`.
        reads_weight: whether dW depends on the values of W.
        reduces: whether dW x = S(x) R for a matrix R (r, out), which `reduced` computes from the
            block. R acts as a smaller weight: the product of x with dW equals the product of S(x)
            with R.
        tiles: whether a block can have an output shard r_out.
        additive: whether dW is linear in D. If so, combining adapters adds up their blocks, which
            gives wrong numbers for a method that is not linear.

    Source: arXiv 2409.15371, section 3, for the methods of `METHODS`.

    Examples:
        >>> import torch
        >>> from disha.functional import Geometry, Method
        >>> class Rows(Method):  # dW[o, i] = D[o]
        ...     name = "rows"
        ...     block_axes = 1
        ...
        ...     def shape(self, geometry, r, r_out):
        ...         return (*geometry.stack, geometry.out_features)
        ...
        ...     def delta(self, block, geometry, matrices):
        ...         return block.unsqueeze(-1).expand(*block.shape, geometry.in_features)
        >>> Rows().delta(torch.tensor([1.0, 2.0]), Geometry(3, 2), None)
        tensor([[1., 1., 1.],
                [2., 2., 2.]])
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    block_axes: ClassVar[int] = 2
    reads_weight: ClassVar[bool] = False
    reduces: ClassVar[bool] = False
    tiles: ClassVar[bool] = False
    additive: ClassVar[bool] = False

    def shape(self, geometry: Geometry, r: int, r_out: int | None) -> tuple[int, ...]:
        """Return the shape of a block, with the stack's axes first.

        Args:
            geometry: the weight's sizes.
            r: shard size.
            r_out: size of the output shard of a tile.
        """
        raise NotImplementedError

    def delta(self, block: Tensor, geometry: Geometry, matrices: Tensor | None) -> Tensor:
        """Return dW as a stack of matrices (..., out, in), in the dtype of its arguments.

        Unless the method `reduces`, D and W come in float32, or in float64 if one of them is wider.
        So dW has all its digits, and is rounded once, when it is added to W.

        Args:
            block: D, with the stack's axes first.
            geometry: the weight's sizes.
            matrices: W (..., out, in) if the method `reads_weight`, or else None.
        """
        if not self.reduces:
            raise NotImplementedError
        return bone_delta_weight(self.reduced(block), geometry.in_features, geometry.out_features)

    def reduced(self, block: Tensor) -> Tensor:
        """Return R with dW x = S(x) R. Called only if the method `reduces`.

        Args:
            block: D, with the stack's axes first.

        Returns:
            Tensor (..., r, out); or (..., r, r_out), whose columns repeat up to the outputs.
        """
        return block

    def product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor, scale: Scale
    ) -> Tensor | None:
        """Return (W + s dW) x + b in a way that takes less memory or time; None for the default.

        The default computes W + s dW, one matrix at a time, and multiplies by it. If the method
        `reduces`, this is not called.

        Args:
            x: input (..., in), or (experts, n, in).
            weight: W (out, in), or (experts, out, in).
            bias: b (out,), or None.
            block: D.
            scale: runtime scale s.
        """
        return None

    def of_outputs(self, block: Tensor, start: int, stop: int, out_features: int) -> Tensor | None:
        """Return the block of the outputs start to stop, or None if it can't be cut there.

        Args:
            block: D of all outputs.
            start: the first output.
            stop: the output after the last one.
            out_features: number of all outputs.
        """
        return None

    def of_inputs(self, block: Tensor, start: int, stop: int, in_features: int) -> Tensor | None:
        """Return the block of the inputs start to stop, or None if it can't be cut there.

        Args:
            block: D of all inputs.
            start: the first input.
            stop: the input after the last one.
            in_features: number of all inputs.
        """
        return None

    def widened(self, block: Tensor, r: int, wider: int) -> Tensor | None:
        """Return the block for a larger shard size with the same dW, or None if there is none.

        Args:
            block: D, with the stack's axes first.
            r: its shard size.
            wider: the larger shard size.
        """
        return None

    def from_lora_b(self, b: Tensor) -> Tensor | None:
        """Return the block whose second LoRA factor is B, or None if the method has no factors.

        Args:
            b: B (..., out, r), with the stack's axes first.
        """
        return None


class _Bone(Method):
    name = "bone"
    aliases = ("miss",)  # its name in later versions of the paper
    reduces = True
    tiles = True
    additive = True

    def shape(self, geometry: Geometry, r: int, r_out: int | None) -> tuple[int, ...]:
        return (*geometry.stack, r, geometry.out_features if r_out is None else r_out)

    def of_outputs(self, block: Tensor, start: int, stop: int, out_features: int) -> Tensor | None:
        return tiled(block, out_features)[..., start:stop]

    def of_inputs(self, block: Tensor, start: int, stop: int, in_features: int) -> Tensor | None:
        offset = start % block.shape[-2]
        return block.roll(-offset, -2) if offset else block  # D'[j] = D[(start + j) mod r]

    def widened(self, block: Tensor, r: int, wider: int) -> Tensor | None:
        return None if wider % r else torch.cat([block] * (wider // r), -2)  # D'[j] = D[j mod r]

    def from_lora_b(self, b: Tensor) -> Tensor | None:
        return b.mT.contiguous()


class _Bat(Method):
    name = "bat"
    block_axes = 3
    reads_weight = True
    additive = True

    def shape(self, geometry: Geometry, r: int, r_out: int | None) -> tuple[int, ...]:
        return (*geometry.stack, shard_count(geometry.out_features, r), r, r)

    def delta(self, block: Tensor, geometry: Geometry, matrices: Tensor | None) -> Tensor:
        assert matrices is not None
        return bat_delta_weight(matrices, block)

    def product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor, scale: Scale
    ) -> Tensor | None:
        if weight.dim() == 2:
            return bat_linear(x, weight, bias, block, scale)
        if x.shape[-2] != 1:
            return None
        return bat_streamed(x, weight.to(x.dtype), scaled(block, scale).to(x.dtype))

    def of_outputs(self, block: Tensor, start: int, stop: int, out_features: int) -> Tensor | None:
        r = block.shape[-1]
        if start % r or (stop % r and stop != out_features):
            return None
        return block[..., start // r : shard_count(stop, r), :, :]

    def of_inputs(self, block: Tensor, start: int, stop: int, in_features: int) -> Tensor | None:
        r = block.shape[-1]
        return None if start % r or (stop % r and stop != in_features) else block


METHODS: dict[str, Method] = {method.name: method for method in (_Bone(), _Bat())}
"""Name of a method -> the method."""


def method_of(name: object) -> Method:
    """Return a method by its name.

    Args:
        name: a key of `METHODS`, or an alias of one of them.

    Raises:
        ArgumentError: there is no such method.

    Examples:
        >>> from disha.functional import method_of
        >>> method_of("bat").reads_weight
        True
        >>> method_of("miss").name
        'bone'
        >>> method_of("lora")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        disha.errors.ArgumentError: unknown method 'lora'; allowed are 'bone', ...
    """
    if isinstance(name, str):
        if name in METHODS:
            return METHODS[name]
        for method in METHODS.values():
            if name in method.aliases:
                return method
    raise ArgumentError(f"unknown method {brief(name)}; allowed are {method_names()}")


def method_names(where: Callable[[Method], bool] = lambda method: True) -> str:
    """Return the names of all methods, or of those that meet a condition, for an error message.

    Args:
        where: the condition; all methods by default.

    Examples:
        >>> from disha.functional import method_names
        >>> method_names(lambda method: method.tiles)
        "'bone'"
    """
    return ", ".join(repr(method.name) for method in METHODS.values() if where(method))


def block_shape(
    method: str,
    layout: Layout,
    shape: Sequence[int],
    r: int,
    r_out: int | None = None,
    rows: Rows = (),
) -> tuple[int, ...]:
    """Return the shape of a block.

    Args:
        method: the method.
        layout: the weight's layout.
        shape: the weight's shape.
        r: shard size.
        r_out: size of the output shard of a tile.
        rows: the adapted outputs; all by default.

    Examples:
        >>> from disha.functional import Layout, block_shape
        >>> block_shape("bone", Layout("out in"), (6, 8), r=4)
        (4, 6)
        >>> block_shape("bat", Layout("expert in out"), (3, 8, 6), r=4)
        (3, 2, 4, 4)
        >>> block_shape("bone", Layout("out in *kernel"), (6, 8, 3, 3), r=2)
        (6, 2, 3, 3)
    """
    matrix_shape = method_of(method).shape(layout.geometry(shape, rows), r, r_out)
    if not _kept_as_weight(method, layout):
        return matrix_shape
    *stack, rows_of_block, columns = matrix_shape
    return layout.shape(Geometry(rows_of_block, columns, tuple(stack)))


def stack_of(method: str, layout: Layout, block: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes of a weight's stack, computed from the shape of its block.

    Args:
        method: the method.
        layout: the weight's layout.
        block: the block's shape.

    Source: arXiv 2409.15371, applied to every matrix of a stack.

    Examples:
        >>> from disha.functional import Layout, stack_of
        >>> stack_of("bone", Layout("out in *kernel"), (6, 2, 3, 3))
        (3, 3)
    """
    if _kept_as_weight(method, layout):
        return layout.geometry(block).stack
    return tuple(block[: len(block) - method_of(method).block_axes])


def misfit(
    method: str, layout: Layout, geometry: Geometry, r: int, r_out: int | None = None
) -> str | None:
    """Return why a block of these sizes does not fit a weight, or None if it does.

    Args:
        method: the method.
        layout: the weight's layout.
        geometry: the weight's sizes.
        r: shard size.
        r_out: size of the output shard of a tile.

    Examples:
        >>> from disha.functional import Geometry, Layout, misfit
        >>> misfit("bone", Layout("out in"), Geometry(8, 6), r=9)
        'r=9 is larger than in_features=8'
    """
    method_of(method)
    inputs, outputs = geometry.in_features, geometry.out_features
    if not inputs or not outputs or 0 in geometry.stack:
        return "its weight is empty"
    if r > inputs:
        return f"r={r} is larger than {layout.inputs_named(inputs)}"
    if r_out is not None and outputs % r_out:
        return f"r_out={r_out} does not divide {layout.outputs_named(outputs)}"
    return None


def delta_weight(
    method: str, layout: Layout, block: Tensor, weight: Tensor, rows: Rows = ()
) -> Tensor:
    """Return dW, without a scale: a tensor of the weight's shape.

    Args:
        method: the method.
        layout: the weight's layout.
        block: D, as it is stored.
        weight: W. Only its shape matters if the method does not read it.
        rows: the adapted outputs; all by default.

    Raises:
        ArgumentError: the method is unknown, or the block does not fit the weight.

    Source: arXiv 2409.15371, section 3.

    Examples:
        >>> import torch
        >>> from disha.functional import Layout, delta_weight
        >>> D = torch.tensor([[1.0], [2.0]])
        >>> delta_weight("bone", Layout("out in"), D, torch.zeros(1, 5))
        tensor([[1., 2., 1., 2., 1.]])
        >>> delta_weight("bone", Layout("in out"), D, torch.zeros(3, 2), rows=((1, 2),))
        tensor([[0., 1.],
                [0., 2.],
                [0., 1.]])
    """
    chosen, geometry = method_of(method), layout.geometry(weight.shape, rows)
    if stack_of(method, layout, block.shape) != geometry.stack:
        raise ArgumentError(
            f"a {method} block of shape {tuple(block.shape)} does not fit a weight of shape "
            f"{tuple(weight.shape)} laid out as {layout.pattern!r}"
        )
    own = matrix_block(method, layout, block)
    matrices = layout.matrices(layout.part(weight, rows)) if chosen.reads_weight else None
    if chosen.reduces:  # dW only repeats the values of R, so it needs no wider dtype
        delta = chosen.delta(own, geometry, matrices)
    else:
        dtype = merge_dtype(weight.dtype, block.dtype)
        matrices = None if matrices is None else matrices.to(dtype)
        with without_autocast(weight.device):
            delta = chosen.delta(own.to(dtype), geometry, matrices)
    if layout.padding_idx is not None:
        delta = delta.index_fill(-1, torch.tensor([layout.padding_idx], device=delta.device), 0.0)
    out_features = layout.geometry(weight.shape).out_features
    return layout.weight(place_rows(delta, rows, out_features))


def widened(method: str, layout: Layout, block: Tensor, r: int, wider: int) -> Tensor | None:
    """Return the block for a larger shard size with the same dW, or None if there is none.

    Args:
        method: the method.
        layout: the weight's layout.
        block: D, as it is stored.
        r: its shard size.
        wider: the larger shard size.

    Source: arXiv 2409.15371, section 3, by the definition of dW.

    Examples:
        >>> import torch
        >>> from disha.functional import Layout, widened
        >>> widened("bone", Layout("out in"), torch.tensor([[1.0], [2.0]]), 2, 4).T
        tensor([[1., 2., 1., 2.]])
    """
    chosen = method_of(method)
    if wider == r:
        return block
    matrices = chosen.widened(matrix_block(method, layout, block), r, wider)
    return None if matrices is None else kept_block(method, layout, matrices)


def lora_factors(
    method: str, layout: Layout, block: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor] | None:
    """Return A (..., r, in) and B (..., out, r) with dW = B A, or None if the method has none.

    They exist for a method that `reduces`: A = [I_r I_r ... I_r] cropped to (r, in).

    Args:
        method: the method.
        layout: the weight's layout.
        block: D, as it is stored.
        geometry: the weight's sizes.

    Source: arXiv 2409.15371, section 3; Hu et al., "LoRA", arXiv 2106.09685.

    Examples:
        >>> import torch
        >>> from disha.functional import Geometry, Layout, lora_factors
        >>> D = torch.tensor([[3.0], [4.0]])
        >>> A, B = lora_factors("bone", Layout("out in"), D, Geometry(5, 1))
        >>> B @ A
        tensor([[3., 4., 3., 4., 3.]])
    """
    chosen = method_of(method)
    if not chosen.reduces:
        return None
    reduced = chosen.reduced(matrix_block(method, layout, block))
    return bone_lora_factors(reduced, geometry.in_features, geometry.out_features)


def matrix_block(method: str, layout: Layout, block: Tensor) -> Tensor:
    """Return a stored block as the method defines it, with the stack's axes first.

    Args:
        method: the method.
        layout: the weight's layout.
        block: D, as it is stored.

    Returns:
        Tensor (*stack, r, out) for Bone; a view where that is possible.

    Source: arXiv 2409.15371, applied at every position of a kernel.

    Examples:
        >>> import torch
        >>> from disha.functional import Layout, matrix_block
        >>> matrix_block("bone", Layout("out in *kernel"), torch.zeros(6, 2, 3, 3)).shape
        torch.Size([3, 3, 2, 6])
    """
    return layout.matrices(block).mT if _kept_as_weight(method, layout) else block


def kept_block(method: str, layout: Layout, block: Tensor) -> Tensor:
    """Return a block as it is stored: the inverse of `matrix_block`.

    Args:
        method: the method.
        layout: the weight's layout.
        block: D as the method defines it, with the stack's axes first.

    Source: arXiv 2409.15371, applied at every position of a kernel.

    Examples:
        >>> import torch
        >>> from disha.functional import Layout, kept_block
        >>> kept_block("bone", Layout("out in *kernel"), torch.zeros(3, 3, 2, 6)).shape
        torch.Size([6, 2, 3, 3])
    """
    return layout.weight(block.mT) if _kept_as_weight(method, layout) else block


def _kept_as_weight(method: str, layout: Layout) -> bool:
    """Whether a block is stored as a small weight of the same layout, with r instead of `in`."""
    return layout.has_kernel and method_of(method).block_axes == 2
