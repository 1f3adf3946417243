"""What a method is: what it defines, what everybody asks of it, and how it is found by its name.

`disha.functional.methods` has the table of all methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final, Literal

import torch
from torch import Tensor

from disha.errors import ArgumentError
from disha.functional.layouts import Geometry, Layout, OutputRanges, place_outputs
from disha.functional.lookups import look_up_columns
from disha.functional.shard_sums import (
    Scale,
    merge_dtype,
    multiply_by_matrix,
    repeat_over_shards,
    shard_count,
    shard_sum_matrix,
    size_of_sum,
    tiled,
    without_autocast,
)
from disha.text import brief

Groups = int | Literal["all"]
"""The number of groups of shards; `ALL_GROUPS` for as many as a weight can have.

That is the number of its shards, or of its outputs if they are fewer.
"""

ALL_GROUPS: Final = "all"

Down = int | Tensor
"""A (..., k, in), or for the matrix of shard sums [I_k I_k ... I_k] the number k."""


class Method:
    """What one method does with one matrix W (out, in), and from that, with a weight of any layout.

    A method defines `shape`, the shape of its block, and one of two things: `delta`, its update dW;
    or `factors`, two matrices A (k, in) and R (k, out) such that dW = R^T A, with `low_rank` set.
    An input then goes down to k numbers for each token, A x, and up to the outputs, R^T (A x).
    Everything else has a default that is correct for any method, but for `step`, from which its
    learning rate is proposed. Override a default where the method can do more, or do it at a lower
    cost. Set `block_axes`, `reads_weight` and `additive` as dW's formula says.

    A method may have settings, as attributes of its instance. Register one instance for each
    setting. Files store only `name`, so two settings need two names: `shift2`, `shift3`.

    What others rely on:

    - A method of low rank has LoRA factors. Any other is exported as a LoRA by cutting dW to a
      rank.
    - `of_outputs` and `of_inputs` say where a block can be cut: by default nowhere. If the method
      is of low rank, A and R are then cut in its place. If not, a tensor-parallel weight can't have
      the block, and a product with some rows of a weight computes the weight.

    Attributes:
        name: its name in configurations and files.
        aliases: other names that users may give it.
        block_axes: number of axes of the block of one matrix.
        reads_weight: whether dW depends on the values of W.
        low_rank: whether dW = R^T A, with the `factors` A and R. Both act as smaller weights.
        compact: whether R is kept in a form of its own, which only `multiply_up` and `dense_up`
            know. Linear layers and stacks multiply by it; elsewhere, R acts.
        spans_kernel: whether a convolution has one block for its whole kernel, and not one for each
            position of it. Its `shape` then leaves the kernel out. If the method is of low rank, A
            is (..., *kernel, k, in), and R is the same at all positions: (..., 1, 1, k, out), with
            an axis for each of the kernel.
        tiles: whether a block can have an output shard r_out.
        additive: whether dW is linear in D. If so, combining adapters adds up their blocks, which
            gives wrong numbers for a method that is not linear.

    Source: arXiv 2409.15371, section 3, for the methods of the library.

    Examples:
        >>> import torch
        >>> from disha.functional import Geometry, Layout, Method, method_of
        >>> bone = method_of("bone")
        >>> bone.block_shape(Layout("out in *kernel"), (6, 8, 3, 3), r=2)
        (6, 2, 3, 3)
        >>> bone.delta_weight(Layout("out in"), torch.tensor([[1.0], [2.0]]), torch.zeros(1, 5))
        tensor([[1., 2., 1., 2., 1.]])
        >>> class Shift(Method):  # dW[o, i] = D[o]
        ...     name = "shift"
        ...     block_axes = 1
        ...
        ...     def shape(self, geometry, r, r_out):
        ...         return (*geometry.stack, geometry.out_features)
        ...
        ...     def delta(self, block, geometry, matrices):
        ...         return block.unsqueeze(-1).expand(*block.shape, geometry.in_features)
        >>> Shift().delta_weight(Layout("in out"), torch.tensor([1.0, 2.0]), torch.zeros(3, 2))
        tensor([[1., 2.],
                [1., 2.],
                [1., 2.]])
    """

    name: str  # of the instance, if it has settings
    aliases: ClassVar[tuple[str, ...]] = ()
    block_axes: ClassVar[int] = 2
    reads_weight: ClassVar[bool] = False
    low_rank: ClassVar[bool] = False
    compact: ClassVar[bool] = False
    spans_kernel: ClassVar[bool] = False
    tiles: ClassVar[bool] = False
    additive: ClassVar[bool] = False

    def __reduce__(self) -> Any:
        # A copied or pickled block has the registered method.
        return (method_of, (self.name,))

    @property
    def block_name(self) -> str:
        """The name of a block in state dicts and files."""
        return f"{self.name}_block"

    def find(self, name: object) -> Method | None:
        """Return the method of this class that has a name, or None."""
        return self if name == self.name or name in self.aliases else None

    # --- one matrix, or a stack with its axes first: what a method defines -----------------------

    def shape(self, geometry: Geometry, r: int, r_out: int | None) -> tuple[int, ...]:
        """Return the shape of a block, which is one tensor, with the stack's axes first."""
        raise NotImplementedError

    def start(self, block: Tensor, geometry: Geometry, layout: Layout) -> None:
        """Fill a new block so that dW is zero, but not its gradient."""
        block.zero_()

    def delta(self, block: Tensor, geometry: Geometry, matrices: Tensor | None) -> Tensor:
        """Return dW as a stack of matrices (..., out, in), in the dtype of its arguments.

        `matrices` is W (..., out, in) if the method `reads_weight`, or else None. D and W come in
        float32, or in float64 if one of them is wider, so that dW is rounded only once: when it is
        added to W.
        """
        raise NotImplementedError

    def factors(self, block: Tensor, geometry: Geometry) -> tuple[Down, Tensor]:
        """Return A (..., k, in) and R (..., k, out) with dW = R^T A.

        In place of A, a number k stands for shard sums: A = [I_k I_k ... I_k], cropped to the
        inputs. A method that is `compact` returns R in its own form.

        The block comes in its own dtype, such as float32 over a bfloat16 weight, and so do A and R.
        Products cast them to the dtype of their input; merging does not.
        """
        return int(block.shape[-2]), block  # a number also while torch.jit traces

    def dense_up(self, up: Tensor, geometry: Geometry) -> Tensor:
        """Return R (..., k, out) of what `factors` returns for it."""
        return tiled(up, geometry.out_features)

    def multiply_up(
        self,
        sums: Tensor,
        up: Tensor,
        geometry: Geometry,
        scale: float = 1.0,
        output: Tensor | None = None,
    ) -> Tensor:
        """Return s sums R for sums (..., n, k), added to an output if there is one.

        `up` is what `factors` returns for R. The output is new, and may be written into.
        """
        return multiply_by_matrix(sums, up, geometry.out_features, scale, output)

    def product(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        block: Tensor,
        scale: Scale,
        with_base: bool = True,
    ) -> Tensor | None:
        """Return (W + s dW) x + b in less memory or time than by computing dW, or None.

        x is (n, in) and W (out, in). Without `with_base`, return the update alone: s dW x + b. It
        is called only if the method is not of low rank.
        """
        return None

    def step(self, inputs: int, r: int) -> float:
        """Return how far a step of Adam at rate 1 moves an output of dW x, for inputs of size 1.

        It moves each entry of D by 1, so an output moves by the sum of |S_j(x)| over its r sums.
        """
        return r * size_of_sum(shard_count(inputs, r))

    def look_up(self, indices: Tensor, block: Tensor, geometry: Geometry) -> Tensor:
        """Return the columns of dW that indices choose, as (..., out).

        It is called only if the method is of low rank.
        """
        down, up = self.factors(block, geometry)
        return look_up_columns(indices, down, up, geometry.out_features)

    def of_outputs(self, block: Tensor, start: int, stop: int, geometry: Geometry) -> Tensor | None:
        """Return the block of the outputs start to stop, or None if it can't be cut there."""
        return None

    def of_inputs(self, block: Tensor, start: int, stop: int, geometry: Geometry) -> Tensor | None:
        """Return the block of the inputs start to stop, or None if it can't be cut there."""
        return None

    def widen(self, block: Tensor, geometry: Geometry, r: int, wider: int) -> Tensor | None:
        """Return the block for a larger shard size with the same dW, or None if there is none."""
        return None

    def join(self, terms: Sequence[tuple[Tensor, float]], geometry: Geometry) -> Tensor | None:
        """Return the block of the sum of f dW whose r is the sum of theirs, or None."""
        return None

    def from_factors(self, a: Tensor, b: Tensor, r: int) -> Tensor | None:
        """Return a block of this r that may have the factors A (..., k, in) and B (..., out, k).

        Whether it has just these, `lora_factors` tells. None if there is none. The inputs are those
        of the whole kernel if the method `spans_kernel`.
        """
        return None

    def with_groups(self, groups: Groups) -> Method | None:
        """Return this method with groups of shards, or None if it can't; with one, it is itself."""
        return self if groups == 1 else None

    def reason_against(
        self, layout: Layout, geometry: Geometry, r: int, r_out: int | None
    ) -> str | None:
        """Return why a weight can't have a block of these sizes, or None if it can."""
        return layout.reason_against(geometry, r, r_out)

    # --- a weight of any layout: what everybody else asks ----------------------------------------

    def block_shape(
        self,
        layout: Layout,
        shape: Sequence[int],
        r: int,
        r_out: int | None = None,
        output_ranges: OutputRanges = (),
    ) -> tuple[int, ...]:
        """Return the shape of the block of a weight, or of those of its outputs."""
        of_matrices = self.shape(layout.geometry(shape, output_ranges), r, r_out)
        if not self._keeps_as_weight(layout):
            return of_matrices
        *stack, inputs, outputs = of_matrices
        return layout.shape(Geometry(inputs, outputs, tuple(stack)))

    def stack_of(self, layout: Layout, block_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the sizes of a weight's stack that the shape of its block tells.

        They are all of them, but without the kernel if the method `spans_kernel`.
        """
        if self._keeps_as_weight(layout):
            return layout.geometry(block_shape).stack
        return tuple(block_shape[: len(block_shape) - self.block_axes])

    def delta_weight(
        self,
        layout: Layout,
        block: Tensor,
        weight: Tensor,
        output_ranges: OutputRanges = (),
    ) -> Tensor:
        """Return dW of a kept block, without a scale: a tensor of the weight's shape.

        Only the shape of the weight matters if the method does not read it.

        Raises:
            ArgumentError: the block does not fit the weight.
        """
        geometry = layout.geometry(weight.shape, output_ranges)
        stack = geometry.stack_without_kernel() if self.spans_kernel else geometry.stack
        if self.stack_of(layout, block.shape) != stack:
            raise self._misfit(layout, block, weight)
        matrix = self.matrix_block(layout, block)
        if self.low_rank:
            delta = self._multiply_factors(matrix, geometry)
        else:
            part = layout.part(weight, output_ranges)
            delta = self._compute_delta(matrix, geometry, layout, part)
        if delta.shape[-2] != geometry.out_features:
            raise self._misfit(layout, block, weight)
        if layout.padding_idx is not None:
            index = torch.tensor([layout.padding_idx], device=delta.device)
            delta = delta.index_fill(-1, index, 0.0)
        out_features = layout.geometry(weight.shape).out_features
        return layout.weight(place_outputs(delta, output_ranges, out_features))

    def _misfit(self, layout: Layout, block: Tensor, weight: Tensor) -> ArgumentError:
        return ArgumentError(
            f"a {self.name} block of shape {tuple(block.shape)} does not fit a weight of shape "
            f"{tuple(weight.shape)} laid out as {layout.pattern!r}"
        )

    def _multiply_factors(self, block: Tensor, geometry: Geometry) -> Tensor:
        """Return R^T A as a stack of matrices."""
        down, up = self.dense_factors(block, geometry)
        if isinstance(down, int):  # dW only repeats the values of R, so it needs no wider dtype
            return repeat_over_shards(up.mT, geometry.in_features)
        dtype = merge_dtype(block.dtype)
        with without_autocast(block):
            return up.mT.to(dtype) @ down.to(dtype)

    def _compute_delta(
        self, block: Tensor, geometry: Geometry, layout: Layout, weight: Tensor
    ) -> Tensor:
        """Return dW as a stack of matrices, in a dtype in which it keeps its digits."""
        dtype = merge_dtype(weight.dtype, block.dtype)
        matrices = layout.matrices(weight).to(dtype) if self.reads_weight else None
        with without_autocast(weight):
            return self.delta(block.to(dtype), geometry, matrices)

    def dense_factors(self, block: Tensor, geometry: Geometry) -> tuple[Down, Tensor]:
        """Return A, or a number for shard sums, and R (..., k, out)."""
        down, up = self.factors(block, geometry)
        return down, self.dense_up(up, geometry)

    def wider_block(
        self, layout: Layout, block: Tensor, geometry: Geometry, r: int, wider: int
    ) -> Tensor | None:
        """Return the kept block for a larger shard size with the same dW, or None."""
        if wider == r:
            return block
        matrices = self.widen(self.matrix_block(layout, block), geometry, r, wider)
        return None if matrices is None else self.kept_block(layout, matrices)

    def lora_factors(
        self, layout: Layout, block: Tensor, geometry: Geometry
    ) -> tuple[Tensor, Tensor] | None:
        """Return A (..., k, in) and B (..., out, k) with dW = B A, or None if there are none.

        A method of low rank has them: for shard sums, A = [I_k I_k ... I_k] cropped to (k, in);
        B = R^T.
        """
        if not self.low_rank:
            return None
        down, up = self.dense_factors(self.matrix_block(layout, block), geometry)
        if isinstance(down, int):
            down = shard_sum_matrix(up, geometry.in_features)
        return down.contiguous(), up.mT.contiguous()

    def matrix_block(self, layout: Layout, block: Tensor) -> Tensor:
        """Convert a kept block to the method's own form, with the axes of the stack first."""
        return layout.matrices(block).mT if self._keeps_as_weight(layout) else block

    def kept_block(self, layout: Layout, block: Tensor) -> Tensor:
        """Convert a block to the form that layers and files keep: the inverse of `matrix_block`."""
        return layout.weight(block.mT) if self._keeps_as_weight(layout) else block

    def _keeps_as_weight(self, layout: Layout) -> bool:
        return layout.has_kernel and self.block_axes == 2 and not self.spans_kernel


METHODS: dict[str, Method] = {}
"""Name -> method, of the library and of users. `register_method` adds one."""


def find_method(name: object) -> Method | None:
    """Return the method with a name or an alias, or None."""
    for method in METHODS.values():
        found = method.find(name)
        if found is not None:
            return found
    return None


def method_of(name: object) -> Method:
    """Return a method by its name, or by an alias.

    Args:
        name: the name of a method of the library, or of one that `register_method` has added.

    Raises:
        ArgumentError: there is no such method.

    Examples:
        >>> from disha.functional import method_of
        >>> method_of("miss").name
        'bone'
    """
    method = find_method(name)
    if method is None:
        raise ArgumentError(f"unknown method {brief(name)}; allowed are {method_names()}")
    return method


def method_names(where: Callable[[Method], bool] = lambda method: True) -> str:
    """Return the names of all methods, or of those that meet a condition, for a message."""
    return ", ".join(repr(method.name) for method in METHODS.values() if where(method))
