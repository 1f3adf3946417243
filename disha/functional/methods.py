"""The table: what every method does with every layout.

A method is defined on one matrix W (out, in) with n = ceil(in / r) shards of its inputs:

    method   block D                 update dW
    bone     (r, out)                dW[o, i] = D[i mod r, o]
    groups   (r, out)                dW[o, i] = D[i mod r, o] if (i // r) mod g = o mod g, else 0:
                                     Bone with `groups`
    tile     (r, r_out)              dW[o, i] = D[i mod r, o mod r_out]: Bone with r_out
    bat      (ceil(out / r), r, r)   dW_ab = W_ab D_a + D_a for every r x r tile of W

A layout (`disha.functional.layouts`) says how a weight becomes a stack of such matrices. The block
of a stack has two forms:

- the one that methods compute with (`matrix_block`): the axes of the stack, then those of D above;
- the one that layers and files keep (`kept_block`): the same, but over a convolution, a D of two
  axes is laid out as the weight is, with r in the place of `in`.

`Method` answers for any layout: `block_shape`, `delta_weight`, `wider_block`, `lora_factors`.
Layers, files, merging and conversions ask it; a method's name stands only in files and arguments.
To add a method: write a subclass of `Method`, and pass an instance to `register_method`.

Source: arXiv 2409.15371, section 3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from disha.errors import ArgumentError, ArgumentTypeError
from disha.functional.bat import bat_delta_weight, bat_linear, bat_streamed
from disha.functional.bone import bone_delta_weight, bone_lora_factors, embedding_delta
from disha.functional.layouts import Geometry, Layout, OutputRanges, place_outputs
from disha.functional.shard_groups import (
    group_count,
    group_factor,
    group_lookup,
    group_product,
)
from disha.functional.shard_sums import (
    Scale,
    merge_dtype,
    scaled,
    shard_count,
    tiled,
    without_autocast,
)
from disha.text import brief

Groups = int | Literal["all"]
"""The number of groups of shards; `ALL_GROUPS` for as many as a weight can have.

That is the number of its shards, or of its outputs if they are fewer.
"""

ALL_GROUPS = "all"


SHARD_CORRELATION = 0.05
"""Of two shards of the inputs of a layer. It was chosen so that the rates of the study agree."""


def size_of_sum(shards: float) -> float:
    """Return the size of a sum of so many shards of size 1."""
    return math.sqrt(shards * (1 + (shards - 1) * SHARD_CORRELATION))


class Method:
    """What one method does with one matrix W (out, in), and from that, with a weight of any layout.

    A method defines `shape`, the shape of its block, and one of two things: `delta`, its update dW;
    or `shard_sum_factor`, a matrix R (r, out) such that dW x = S(x) R, with `uses_shard_sum` set.
    Everything else has a default that is correct for any method. Override it where the method can
    do more, or do it at a lower cost. Set `block_axes`, `reads_weight` and `additive` as dW's
    formula says.

    A method may have settings, as attributes of its instance. Register one instance for each
    setting. Files store only `name`, so two settings need two names: `shift2`, `shift3`.

    What others rely on:

    - A method that uses shard sums has LoRA factors. Any other is exported as a LoRA by cutting dW
      to a rank.
    - `of_outputs` and `of_inputs` say where a block can be cut: by default nowhere. If the method
      uses shard sums, R is then cut in its place. If not, a tensor-parallel weight can't have the
      block, and a product with some rows of a weight computes the weight.

    Attributes:
        name: its name in configurations and files.
        aliases: other names that users may give it.
        block_axes: number of axes of the block of one matrix.
        reads_weight: whether dW depends on the values of W.
        uses_shard_sum: whether dW x = S(x) R. R acts as a smaller weight: the product of x with dW
            equals the product of S(x) with R.
        prefers_product: whether `product` costs less than the product with R. Only for a method
            that uses shard sums. It then acts in linear layers, and in stacks with one update.
            Elsewhere, R acts: in convolutions, tied heads and grouped products of experts.
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
    uses_shard_sum: ClassVar[bool] = False
    prefers_product: ClassVar[bool] = False
    tiles: ClassVar[bool] = False
    additive: ClassVar[bool] = False

    def __reduce__(self) -> Any:
        # A copied or pickled block has the registered method.
        return (method_of, (self.name,))

    # --- one matrix, or a stack with its axes first: what a method defines -----------------------

    def shape(self, geometry: Geometry, r: int, r_out: int | None) -> tuple[int, ...]:
        """Return the shape of a block, which is one tensor, with the stack's axes first."""
        raise NotImplementedError

    def delta(self, block: Tensor, geometry: Geometry, matrices: Tensor | None) -> Tensor:
        """Return dW as a stack of matrices (..., out, in), in the dtype of its arguments.

        `matrices` is W (..., out, in) if the method `reads_weight`, or else None. D and W come in
        float32, or in float64 if one of them is wider, so that dW is rounded only once: when it is
        added to W.
        """
        raise NotImplementedError

    def shard_sum_factor(self, block: Tensor, geometry: Geometry, r: int) -> Tensor:
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
        with_base: bool = True,
    ) -> Tensor | None:
        """Return (W + s dW) x + b in less memory or time than by computing dW, or None.

        Without `with_base`, return the update alone: s dW x + b. One of these is given:

        - x (n, in) and W (out, in), with or without b;
        - x (experts, n, in) and W (experts, out, in), without b. If all experts have the same
          input, x may be (1, n, in), but only for a method that `prefers_product`.

        If the method uses shard sums, it is called only if the method also `prefers_product`. Then
        it must not return None, and without `with_base`, it must not read W: the block may be one
        of some outputs of W. If the method does not read W, W may have another dtype than x.
        """
        return None

    def step(self, inputs: int, r: int) -> float:
        """Return how far a step of Adam at rate 1 moves an output of dW x, for inputs of size 1.

        It moves each entry of D by 1, so an output moves by the sum of |S_j(x)| over its r sums.
        """
        return r * size_of_sum(shard_count(inputs, r))

    def look_up(self, indices: Tensor, block: Tensor, geometry: Geometry, r: int) -> Tensor:
        """Return the columns of dW that indices choose, as (..., out).

        It is called only if the method uses shard sums.
        """
        factor = self.shard_sum_factor(block, geometry, r)
        return embedding_delta(indices, factor, geometry.out_features)

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

    def widen(self, block: Tensor, r: int, wider: int) -> Tensor | None:
        """Return the block for a larger shard size with the same dW, or None if there is none."""
        return None

    def from_lora_b(self, b: Tensor) -> Tensor | None:
        """Return the block whose second LoRA factor is B (..., out, r), or None."""
        return None

    def with_groups(self, groups: Groups) -> Method | None:
        """Return this method with groups of shards, or None if it can't; with one, it is itself."""
        return self if groups == 1 else None

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
        """Return the sizes of a weight's stack, from the shape of its block."""
        if self._keeps_as_weight(layout):
            return layout.geometry(block_shape).stack
        return tuple(block_shape[: len(block_shape) - self.block_axes])

    def delta_weight(
        self,
        layout: Layout,
        block: Tensor,
        weight: Tensor,
        output_ranges: OutputRanges = (),
        r: int = 0,
    ) -> Tensor:
        """Return dW of a kept block, without a scale: a tensor of the weight's shape.

        Only the shape of the weight matters if the method does not read it. Methods of the library
        know r from their block.

        Raises:
            ArgumentError: the block does not fit the weight.
        """
        geometry = layout.geometry(weight.shape, output_ranges)
        if self.stack_of(layout, block.shape) != geometry.stack:
            raise ArgumentError(
                f"a {self.name} block of shape {tuple(block.shape)} does not fit a weight of shape "
                f"{tuple(weight.shape)} laid out as {layout.pattern!r}"
            )
        matrix = self.matrix_block(layout, block)
        if self.uses_shard_sum:  # dW only repeats the values of R, so it needs no wider dtype
            factor = self.shard_sum_factor(matrix, geometry, r)
            delta = bone_delta_weight(factor, geometry.in_features, geometry.out_features)
        else:
            part = layout.part(weight, output_ranges)
            delta = self._compute_delta(matrix, geometry, layout, part)
        if layout.padding_idx is not None:
            index = torch.tensor([layout.padding_idx], device=delta.device)
            delta = delta.index_fill(-1, index, 0.0)
        out_features = layout.geometry(weight.shape).out_features
        return layout.weight(place_outputs(delta, output_ranges, out_features))

    def _compute_delta(
        self, block: Tensor, geometry: Geometry, layout: Layout, weight: Tensor
    ) -> Tensor:
        """Return dW as a stack of matrices, in a dtype in which it keeps its digits."""
        dtype = merge_dtype(weight.dtype, block.dtype)
        matrices = layout.matrices(weight).to(dtype) if self.reads_weight else None
        with without_autocast(weight.device):
            return self.delta(block.to(dtype), geometry, matrices)

    def wider_block(self, layout: Layout, block: Tensor, r: int, wider: int) -> Tensor | None:
        """Return the kept block for a larger shard size with the same dW, or None."""
        if wider == r:
            return block
        matrices = self.widen(self.matrix_block(layout, block), r, wider)
        return None if matrices is None else self.kept_block(layout, matrices)

    def lora_factors(
        self, layout: Layout, block: Tensor, geometry: Geometry, r: int = 0
    ) -> tuple[Tensor, Tensor] | None:
        """Return A (..., r, in) and B (..., out, r) with dW = B A, or None if there are none.

        A method that uses shard sums has them: A = [I_r I_r ... I_r] cropped to (r, in), B = R^T.
        """
        if not self.uses_shard_sum:
            return None
        factor = self.shard_sum_factor(self.matrix_block(layout, block), geometry, r)
        return bone_lora_factors(factor, geometry.in_features, geometry.out_features)

    def matrix_block(self, layout: Layout, block: Tensor) -> Tensor:
        """Convert a kept block to the method's own form, with the axes of the stack first."""
        return layout.matrices(block).mT if self._keeps_as_weight(layout) else block

    def kept_block(self, layout: Layout, block: Tensor) -> Tensor:
        """Convert a block to the form that layers and files keep: the inverse of `matrix_block`."""
        return layout.weight(block.mT) if self._keeps_as_weight(layout) else block

    def _keeps_as_weight(self, layout: Layout) -> bool:
        return layout.has_kernel and self.block_axes == 2


class _Bone(Method):
    name = "bone"
    aliases = ("miss",)  # its name in later versions of the paper
    uses_shard_sum = True
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

    def widen(self, block: Tensor, r: int, wider: int) -> Tensor | None:
        return None if wider % r else torch.cat([block] * (wider // r), -2)  # D'[j] = D[j mod r]

    def from_lora_b(self, b: Tensor) -> Tensor | None:
        return b.mT.contiguous()

    def with_groups(self, groups: Groups) -> Method | None:
        if groups == 1:
            return self
        if groups == ALL_GROUPS:
            return method_of("bone_groups_all")
        # A weight has as many groups as it can, so a larger number than names can have means this.
        return method_of(f"bone_groups{min(groups, 999_999_999)}")


class _BoneGroups(Method):
    uses_shard_sum = True
    prefers_product = True
    additive = True

    def __init__(self, name: str, groups: int | None) -> None:
        self.name = name
        self.groups = groups  # None for as many as possible

    def shape(self, geometry: Geometry, r: int, r_out: int | None) -> tuple[int, ...]:
        return (*geometry.stack, r, geometry.out_features)

    def shard_sum_factor(self, block: Tensor, geometry: Geometry, r: int) -> Tensor:
        return group_factor(block, self._count(block, geometry.in_features))

    def product(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        block: Tensor,
        scale: Scale,
        with_base: bool = True,
    ) -> Tensor:
        groups = self._count(block, x.shape[-1])
        return group_product(x, weight, bias, block, scale, groups, with_base)

    def step(self, inputs: int, r: int) -> float:
        shards = shard_count(inputs, r)
        return r * size_of_sum(shards / min(self.groups or shards, shards))

    def look_up(self, indices: Tensor, block: Tensor, geometry: Geometry, r: int) -> Tensor:
        return group_lookup(indices, block, self._count(block, geometry.in_features))

    def of_outputs(
        self, block: Tensor, start: int, stop: int, geometry: Geometry, r: int
    ) -> Tensor | None:
        part = block[..., start:stop]
        groups = self._count(block, geometry.in_features)
        keeps_groups = start % groups == 0 and self._count(part, geometry.in_features) == groups
        return part if keeps_groups else None

    def of_inputs(
        self, block: Tensor, start: int, stop: int, geometry: Geometry, r: int
    ) -> Tensor | None:
        groups = self._count(block, geometry.in_features)
        size = groups * block.shape[-2]
        keeps_groups = start % size == 0 and self._count(block, stop - start) == groups
        return block if keeps_groups else None

    def _count(self, block: Tensor, in_features: int) -> int:
        return group_count(self.groups, in_features, block)


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
        with_base: bool = True,
    ) -> Tensor | None:
        if weight.dim() == 2:
            return bat_linear(x, weight, bias, block, scale, with_base)
        # Of a stack, only the whole product of one token with each matrix is faster.
        if x.shape[-2] != 1 or not with_base:
            return None
        return bat_streamed(x, weight.to(x.dtype), scaled(block, scale).to(x.dtype))

    def of_outputs(
        self, block: Tensor, start: int, stop: int, geometry: Geometry, r: int
    ) -> Tensor | None:
        size = block.shape[-1]  # the argument r may be 0: methods of the library know r from D
        if start % size or (stop % size and stop != geometry.out_features):
            return None
        return block[..., start // size : shard_count(stop, size), :, :]

    def of_inputs(
        self, block: Tensor, start: int, stop: int, geometry: Geometry, r: int
    ) -> Tensor | None:
        size = block.shape[-1]
        if start % size or (stop % size and stop != geometry.in_features):
            return None
        return block


BONE = _Bone()

METHODS: dict[str, Method] = {method.name: method for method in (BONE, _Bat())}
"""Name -> method, of the library and of users. `register_method` adds one."""

_GROUPS = re.compile(r"bone_groups(_all|[2-9]|[1-9][0-9]{1,8})")
"""The names of Bone with groups of shards. `find_method` makes a method for each of them."""


def register_method(method: Method) -> None:
    """Make a method known by its name, everywhere: in arguments, files, merging and copies.

    Register it before you load a file that has blocks of it. A second call with the same
    settings replaces the method, also if its class was defined again, as in a notebook.

    Args:
        method: an instance of a subclass of `Method`.

    Raises:
        ArgumentTypeError: `method` is not such an instance, or lacks what a method must define.
        ArgumentError: another method, or another setting of this one, has its name, or the name
            can't be part of a key in a file.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> import disha
        >>> class Shift(disha.functional.Method):
        ...     block_axes = 1  # dW[o, i] = D[o] + offset
        ...
        ...     def __init__(self, offset):
        ...         self.offset = offset
        ...         self.name = f"shift{offset}"
        ...
        ...     def shape(self, geometry, r, r_out):
        ...         return (*geometry.stack, geometry.out_features)
        ...
        ...     def delta(self, block, geometry, matrices):
        ...         rows = block.unsqueeze(-1) + self.offset
        ...         return rows.expand(*block.shape, geometry.in_features)
        >>> disha.register_method(Shift(2))
        >>> layer = disha.inject_adapters(nn.Linear(3, 1), "all-linear", r=1, method="shift2")
        >>> layer.delta_weight(layer.disha["default"])
        tensor([[2., 2., 2.]], grad_fn=<ExpandBackward0>)
    """
    if not isinstance(method, Method):
        raise ArgumentTypeError(
            f"register_method needs an instance of a subclass of Method, got {brief(method)}"
        )
    cls = type(method)
    missing = []
    if not isinstance(getattr(method, "name", None), str):
        missing.append("name (a str)")
    if cls.shape is Method.shape:
        missing.append("shape")
    if cls.delta is Method.delta and not method.uses_shard_sum:
        missing.append("delta, or uses_shard_sum = True with shard_sum_factor")
    if missing:
        raise ArgumentTypeError(f"the method {cls.__name__} must define {', '.join(missing)}")
    if method.prefers_product and not method.uses_shard_sum:
        raise ArgumentTypeError(
            f"the method {cls.__name__} must also define uses_shard_sum = True with "
            "shard_sum_factor, because it sets prefers_product"
        )
    if not method.name.isidentifier():
        raise ArgumentError(
            f"{brief(method.name)} can't name a method: use letters, digits and underscores, as "
            "in the names of Python"
        )
    for name in (method.name, *method.aliases):
        known = find_method(name)
        if known is not None and not _have_same_class(known, method):
            raise ArgumentError(
                f"there is a method {name!r} already, of the class {type(known).__name__}; give "
                f"{cls.__name__} another name"
            )
        # A file has the name alone, so it could not tell two settings of one name apart.
        if type(known) is cls and vars(known) != vars(method):
            raise ArgumentError(
                f"there is a method {name!r} already, with other settings; files store only the "
                "name, so give each setting its own"
            )
    METHODS[method.name] = method


def _have_same_class(first: Method, second: Method) -> bool:
    """Whether two methods have one class, or classes of one name: a notebook defines it again."""
    first_class = type(first)
    second_class = type(second)
    same_module = first_class.__module__ == second_class.__module__
    return same_module and first_class.__qualname__ == second_class.__qualname__


def find_method(name: object) -> Method | None:
    """Return the method with a name or an alias, or None."""
    for method in METHODS.values():
        if name == method.name or name in method.aliases:
            return method
    if isinstance(name, str) and _GROUPS.fullmatch(name):
        return _bone_with_groups(name)
    return None


@cache  # so that a name always means the same object
def _bone_with_groups(name: str) -> Method:
    number = name.removeprefix("bone_groups")
    if number == "_all":
        return _BoneGroups(name, groups=None)
    return _BoneGroups(name, int(number))


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
