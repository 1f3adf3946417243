"""The table: what every method does with every layout.

A method is defined on one matrix W (out, in) with n = ceil(in / r) shards of its inputs:

    method   block D                 update dW
    bone     (r, out)                dW[o, i] = D[i mod r, o]
    tile     (r, r_out)              dW[o, i] = D[i mod r, o mod r_out]: Bone with r_out
    bat      (ceil(out / r), r, r)   dW_ab = W_ab D_a + D_a for every r x r tile of W
    rows     (in, out)               dW = D^T - W: D has new values of W, usually of a few rows

A layout (`disha.functional.layouts`) says how a weight becomes a stack of such matrices. A block
then has the axes of the stack before its own. In a convolution, a block of two axes is kept like
the weight, with r in the place of `in`.

`Method` answers for any layout: `block_shape`, `delta_weight`, `wider_block`, `lora_factors`.
Layers, files, merging and conversions ask it; a method's name stands only in files and arguments.
To add a method: write a subclass of `Method`, and put an instance into `METHODS`.

Source: arXiv 2409.15371, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from disha.errors import ArgumentError
from disha.functional.bat import bat_delta_weight, bat_linear, bat_streamed
from disha.functional.bone import bone_delta_weight, bone_lora_factors
from disha.functional.layouts import Geometry, Layout, Rows, place_rows
from disha.functional.shard_sums import (
    Scale,
    merge_dtype,
    scaled,
    shard_count,
    tiled,
    without_autocast,
)
from disha.text import brief


class Method:
    """What one method does with one matrix W (out, in), and from that, with a weight of any layout.

    A method defines `shape`, the shape of its block, and `delta`, its update; or, if it `reduces`,
    `reduced` instead of `delta`. Everything else has a default that is correct for any method.
    Override it where the method can do more, or do it at a lower cost. Set `block_axes`,
    `reads_weight` and `additive` as the formula of dW says.

    What others rely on:

    - A method has LoRA factors if it `reduces`, and otherwise none: it is exported as a LoRA by
      cutting dW to a rank.
    - A block can be cut at multiples of r, in inputs (`of_inputs`) and in outputs (`of_outputs`).
      Where it can't, as by default, a tensor-parallel weight can't have it, and products with some
      rows of a weight compute the weight.
    - A method that `reduces` can be cut anywhere: R has a column for each output.

    Attributes:
        name: its name in configurations and files.
        aliases: other names that users may give it.
        block_axes: number of axes of the block of one matrix.
        reads_weight: whether dW depends on the values of W.
        reduces: whether dW x = S(x) R for a matrix R (r, out), which `reduced` computes from the
            block. R acts as a smaller weight: the product of x with dW equals the product of S(x)
            with R.
        tiles: whether a block can have an output shard r_out.
        replaces: whether D^T has new values of W, and so starts as W is, whatever `init` says.
        additive: whether dW is linear in D. If so, combining adapters adds up their blocks, which
            gives wrong numbers for a method that is not linear.

    Source: arXiv 2409.15371, section 3, for the methods of `METHODS`.

    Examples:
        >>> import torch
        >>> from disha.functional import Geometry, Layout, Method, method_of
        >>> bone = method_of("bone")
        >>> bone.block_shape(Layout("out in *kernel"), (6, 8, 3, 3), r=2)
        (6, 2, 3, 3)
        >>> bone.delta_weight(Layout("out in"), torch.tensor([[1.0], [2.0]]), torch.zeros(1, 5))
        tensor([[1., 2., 1., 2., 1.]])
        >>> class Rows(Method):  # dW[o, i] = D[o]
        ...     name = "rows"
        ...     block_axes = 1
        ...
        ...     def shape(self, geometry, r, r_out):
        ...         return (*geometry.stack, geometry.out_features)
        ...
        ...     def delta(self, block, geometry, matrices):
        ...         return block.unsqueeze(-1).expand(*block.shape, geometry.in_features)
        >>> Rows().delta_weight(Layout("in out"), torch.tensor([1.0, 2.0]), torch.zeros(3, 2))
        tensor([[1., 2.],
                [1., 2.],
                [1., 2.]])
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    block_axes: ClassVar[int] = 2
    reads_weight: ClassVar[bool] = False
    reduces: ClassVar[bool] = False
    tiles: ClassVar[bool] = False
    replaces: ClassVar[bool] = False
    additive: ClassVar[bool] = False

    def __reduce__(self) -> Any:
        return (method_of, (self.name,))  # a copied or pickled block has the same method

    # --- one matrix, or a stack with its axes first: what a method defines -----------------------

    def shape(self, geometry: Geometry, r: int, r_out: int | None) -> tuple[int, ...]:
        """Return the shape of a block, which is one tensor, with the stack's axes first."""
        raise NotImplementedError

    def delta(self, block: Tensor, geometry: Geometry, matrices: Tensor | None) -> Tensor:
        """Return dW as a stack of matrices (..., out, in), in the dtype of its arguments.

        `matrices` is W (..., out, in) if the method `reads_weight`, or else None. Unless the method
        `reduces`, D and W come in float32, or in float64 if one of them is wider. So dW has all its
        digits, and is rounded once, when it is added to W.
        """
        raise NotImplementedError

    def reduced(self, block: Tensor, geometry: Geometry, r: int) -> Tensor:
        """Return R (..., r, out) with dW x = S(x) R; or (..., r, r_out), whose columns repeat.

        The block comes in its own dtype, such as float32 over a bfloat16 weight, and so does R.
        Products cast R to the dtype of their input; merging does not.
        """
        return block

    def product(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        block: Tensor,
        scale: Scale,
        share: float = 1.0,
    ) -> Tensor | None:
        """Return (share W + s dW) x + b in less memory or time than by computing dW, or None.

        The share is 1, or 0 where the update alone is asked for.
        x is (..., in) and W (out, in), or x is (experts, n, in) and W (experts, out, in). Not
        called if the method `reduces`.
        """
        return None

    def of_outputs(
        self, block: Tensor, start: int, stop: int, geometry: Geometry, r: int
    ) -> Tensor | None:
        """Return the block of the outputs start to stop, or None if it can't be cut there."""
        return None

    def of_inputs(
        self, block: Tensor, start: int, stop: int, geometry: Geometry, r: int
    ) -> Tensor | None:
        """Return the block of the inputs start to stop, or None if it can't be cut there."""
        return None

    def widened(self, block: Tensor, r: int, wider: int) -> Tensor | None:
        """Return the block for a larger shard size with the same dW, or None if there is none."""
        return None

    def from_lora_b(self, b: Tensor) -> Tensor | None:
        """Return the block whose second LoRA factor is B (..., out, r), or None."""
        return None

    # --- a weight of any layout: what everybody else asks ----------------------------------------

    def block_shape(
        self,
        layout: Layout,
        shape: Sequence[int],
        r: int,
        r_out: int | None = None,
        rows: Rows = (),
    ) -> tuple[int, ...]:
        """Return the shape of the block of a weight, or of some of its rows."""
        of_matrices = self.shape(layout.geometry(shape, rows), r, r_out)
        if not self._keeps_as_weight(layout):
            return of_matrices
        *stack, inputs, outputs = of_matrices
        return layout.shape(Geometry(inputs, outputs, tuple(stack)))

    def stack_of(self, layout: Layout, block: Sequence[int]) -> tuple[int, ...]:
        """Return the sizes of a weight's stack, from the shape of its block."""
        if self._keeps_as_weight(layout):
            return layout.geometry(block).stack
        return tuple(block[: len(block) - self.block_axes])

    def delta_weight(
        self, layout: Layout, block: Tensor, weight: Tensor, rows: Rows = (), r: int = 0
    ) -> Tensor:
        """Return dW of a kept block, without a scale: a tensor of the weight's shape.

        Only the shape of the weight matters if the method does not read it. Methods of `METHODS`
        know r from their block.

        Raises:
            ArgumentError: the block does not fit the weight.
        """
        geometry = layout.geometry(weight.shape, rows)
        if self.stack_of(layout, block.shape) != geometry.stack:
            raise ArgumentError(
                f"a {self.name} block of shape {tuple(block.shape)} does not fit a weight of shape "
                f"{tuple(weight.shape)} laid out as {layout.pattern!r}"
            )
        matrix = self.matrix_block(layout, block)
        if self.reduces:  # dW only repeats the values of R, so it needs no wider dtype
            reduced = self.reduced(matrix, geometry, r)
            delta = bone_delta_weight(reduced, geometry.in_features, geometry.out_features)
        else:
            dtype = merge_dtype(weight.dtype, block.dtype)
            matrices = None
            if self.reads_weight:
                matrices = layout.matrices(layout.part(weight, rows)).to(dtype)
            with without_autocast(weight.device):
                delta = self.delta(matrix.to(dtype), geometry, matrices)
        if layout.padding_idx is not None:
            index = torch.tensor([layout.padding_idx], device=delta.device)
            delta = delta.index_fill(-1, index, 0.0)
        out_features = layout.geometry(weight.shape).out_features
        return layout.weight(place_rows(delta, rows, out_features))

    def block_of(self, layout: Layout, part: Tensor) -> Tensor:
        """Return the block that `replaces` a weight, or some rows of one, by the same values."""
        return self.kept_block(layout, layout.matrices(part).mT)

    def wider_block(self, layout: Layout, block: Tensor, r: int, wider: int) -> Tensor | None:
        """Return the kept block for a larger shard size with the same dW, or None."""
        if wider == r:
            return block
        matrices = self.widened(self.matrix_block(layout, block), r, wider)
        return None if matrices is None else self.kept_block(layout, matrices)

    def lora_factors(
        self, layout: Layout, block: Tensor, geometry: Geometry, r: int = 0
    ) -> tuple[Tensor, Tensor] | None:
        """Return A (..., r, in) and B (..., out, r) with dW = B A, or None if there are none.

        They exist for a method that `reduces`: A = [I_r I_r ... I_r] cropped to (r, in).
        """
        if not self.reduces:
            return None
        reduced = self.reduced(self.matrix_block(layout, block), geometry, r)
        return bone_lora_factors(reduced, geometry.in_features, geometry.out_features)

    def matrix_block(self, layout: Layout, block: Tensor) -> Tensor:
        """Return a block that layers and files *keep* as the method defines it, its stack first."""
        return layout.matrices(block).mT if self._keeps_as_weight(layout) else block

    def kept_block(self, layout: Layout, block: Tensor) -> Tensor:
        """Return a block as files and layers keep it: the inverse of `matrix_block`."""
        return layout.weight(block.mT) if self._keeps_as_weight(layout) else block

    def _keeps_as_weight(self, layout: Layout) -> bool:
        return layout.has_kernel and self.block_axes == 2


class _Bone(Method):
    name = "bone"
    aliases = ("miss",)  # its name in later versions of the paper
    reduces = True
    tiles = True
    additive = True

    def shape(self, geometry: Geometry, r: int, r_out: int | None) -> tuple[int, ...]:
        return (*geometry.stack, r, geometry.out_features if r_out is None else r_out)

    def of_outputs(
        self, block: Tensor, start: int, stop: int, geometry: Geometry, r: int
    ) -> Tensor | None:
        return tiled(block, geometry.out_features)[..., start:stop]

    def of_inputs(
        self, block: Tensor, start: int, stop: int, geometry: Geometry, r: int
    ) -> Tensor | None:
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
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        block: Tensor,
        scale: Scale,
        share: float = 1.0,
    ) -> Tensor | None:
        if weight.dim() == 2:
            return bat_linear(x, weight, bias, block, scale, share)
        if x.shape[-2] != 1:
            return None
        return bat_streamed(x, weight.to(x.dtype), scaled(block, scale).to(x.dtype))

    def of_outputs(
        self, block: Tensor, start: int, stop: int, geometry: Geometry, r: int
    ) -> Tensor | None:
        r = block.shape[-1]
        if start % r or (stop % r and stop != geometry.out_features):
            return None
        return block[..., start // r : shard_count(stop, r), :, :]

    def of_inputs(
        self, block: Tensor, start: int, stop: int, geometry: Geometry, r: int
    ) -> Tensor | None:
        r = block.shape[-1]
        return None if start % r or (stop % r and stop != geometry.in_features) else block


class _Rows(Method):
    name = "rows"
    reads_weight = True
    replaces = True

    def shape(self, geometry: Geometry, r: int, r_out: int | None) -> tuple[int, ...]:
        return (*geometry.stack, geometry.in_features, geometry.out_features)

    def delta(self, block: Tensor, geometry: Geometry, matrices: Tensor | None) -> Tensor:
        assert matrices is not None
        return block.mT - matrices

    def of_outputs(
        self, block: Tensor, start: int, stop: int, geometry: Geometry, r: int
    ) -> Tensor | None:
        return block[..., start:stop]

    def of_inputs(
        self, block: Tensor, start: int, stop: int, geometry: Geometry, r: int
    ) -> Tensor | None:
        return block[..., start:stop, :]


METHODS: dict[str, Method] = {method.name: method for method in (_Bone(), _Bat(), _Rows())}
"""Name of a method -> the method."""


def method_of(name: object) -> Method:
    """Return a method by its name, or by an alias.

    Args:
        name: a key of `METHODS`, or an alias of one of them.

    Raises:
        ArgumentError: there is no such method.

    Examples:
        >>> from disha.functional import method_of
        >>> method_of("miss").name
        'bone'
    """
    for method in METHODS.values():
        if name == method.name or name in method.aliases:
            return method
    raise ArgumentError(f"unknown method {brief(name)}; allowed are {method_names()}")


def method_names(where: Callable[[Method], bool] = lambda method: True) -> str:
    """Return the names of all methods, or of those that meet a condition, for a message."""
    return ", ".join(repr(method.name) for method in METHODS.values() if where(method))
