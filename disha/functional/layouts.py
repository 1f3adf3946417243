"""Layouts: which axes of a weight are its outputs, its inputs, and its stack.

A weight is a stack of matrices W (out, in). A layout names the axes of the weight as an einops
pattern does, and converts between the weight and its matrices:

    pattern              matrices                       examples
    "out in"             (out, in)                      nn.Linear, the gates of nn.LSTM
    "in out"             (out, in)                      Conv1D of GPT-2, parameters used as x @ W
    "index out"          (out, index)                   nn.Embedding: the input is looked up
    "out in *kernel"     (*kernel, out, in)             convolutions, `in` channels of one group
    "in out *kernel"     (groups, *kernel, out, in)     transposed convolutions
    "expert out in"      (expert, out, in)              experts, nn.Bilinear
    "expert in out"      (expert, out, in)              experts that are used as x @ W

Besides `out` and `in`, an axis is

- `expert`, along which a module chooses matrices: always the first axis;
- `index`, an `in` whose inputs are looked up;
- `*kernel`, which stands for all remaining axes: always the last ones.

The functions listed below rely on these places, and so do the rules for indexing.

To add a layout:

1. Add its pattern to `PATTERNS`, and to `_TRANSPOSED` if `PATTERNS` has the layout of `weight.mT`.
2. Teach two inverse pairs of `Layout` where each axis is: `geometry` and `shape`, `matrices` and
   `weight`.
3. Check what asks for axes by their names: `has_kernel`, `in_first`, `experts_first`,
   `of_one_expert`, `reason_against_shape`, and `update_of_part` in `functional.parts`.
4. Decide how layers and files keep its blocks (`Method.kept_block`): with the axes of the stack
   first, or laid out as the weight, like the blocks of two axes of a convolution. If as the weight,
   a view that moves axes of the weight has to move those of the block too.
5. Add rules to `disha.effective`; indexing is in `views.select_item`. Without a rule, a product
   computes the effective weight. A rule for a view acts if its result is an `EffectiveWeight`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from disha.errors import ArgumentError, ArgumentTypeError

OutputRanges = tuple[tuple[int, int], ...]
"""Ranges (first, stop) of a weight's outputs, in order and without overlap. Empty means all."""

PATTERNS = (
    "out in",
    "in out",
    "index out",
    "out in *kernel",
    "in out *kernel",
    "expert out in",
    "expert in out",
)
"""The layouts that a weight can have."""

_TRANSPOSED = {
    "out in": "in out",
    "in out": "out in",
    "index out": "out in",
    "expert out in": "expert in out",
    "expert in out": "expert out in",
}

_AXES = {pattern: tuple(pattern.split()) for pattern in PATTERNS}


class Geometry(NamedTuple):
    """The sizes of a weight that its blocks depend on.

    Attributes:
        in_features: size of the dimension that r cuts into shards: a linear layer's inputs, the
            input channels of one group of a convolution, or the rows of an embedding.
        out_features: size of the dimension that r_out cuts: outputs, output channels, or the
            size of an embedding.
        stack: sizes of the stack's axes: experts, groups of a transposed convolution, a kernel.
        kernel_axes: how many of these, the last ones, are of a kernel.

    Examples:
        >>> from disha.functional import Layout
        >>> Layout("out in").geometry((16, 8))
        Geometry(in_features=8, out_features=16, stack=(), kernel_axes=0)
    """

    in_features: int
    out_features: int
    stack: tuple[int, ...] = ()
    kernel_axes: int = 0

    # Methods of a tuple that torch 2.8 compiles, as it does not compile its properties.

    def kernel(self) -> tuple[int, ...]:
        """Return the sizes of the kernel."""
        return self.stack[len(self.stack) - self.kernel_axes :]

    def stack_without_kernel(self) -> tuple[int, ...]:
        """Return the sizes of the other axes of the stack."""
        return self.stack[: len(self.stack) - self.kernel_axes]


@dataclass(frozen=True)
class Layout:
    """Which axes of a weight are its outputs, its inputs, and its stack.

    Attributes:
        pattern: one of `PATTERNS`.
        groups: groups of a transposed convolution; the weight has their inputs one after another.
        padding_idx: index of an embedding's row that gets no update.

    Examples:
        >>> import torch
        >>> from disha.functional import Layout
        >>> Layout("in out").geometry((5, 3))
        Geometry(in_features=5, out_features=3, stack=(), kernel_axes=0)
        >>> Layout("out in *kernel").matrices(torch.zeros(4, 2, 3, 3)).shape
        torch.Size([3, 3, 4, 2])
    """

    pattern: str
    groups: int = 1
    padding_idx: int | None = None

    def __str__(self) -> str:
        groups = "" if self.groups == 1 else f" of {self.groups} groups"
        padding = "" if self.padding_idx is None else f" with padding_idx={self.padding_idx}"
        return f"{self.pattern!r}{groups}{padding}"

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the axes. `*kernel` stands for all remaining ones."""
        return _AXES[self.pattern]

    @property
    def has_kernel(self) -> bool:
        """Whether it is the layout of a convolution; in all of them, the kernel is last."""
        return "*kernel" in self.pattern

    @property
    def experts_first(self) -> bool:
        """Whether a weight is a stack of experts, which its first dimension counts."""
        return self.pattern.startswith("expert")

    @property
    def in_first(self) -> bool:
        """Whether the axis of the inputs (`in` or `index`) comes before that of the outputs."""
        return self.pattern.startswith(("in", "expert in"))

    def transposed(self) -> Layout | None:
        """Return the layout of `weight.mT`, or None if `PATTERNS` has none."""
        pattern = _TRANSPOSED.get(self.pattern)
        # `padding_idx` counts rows, and would be a column there.
        if pattern is None or self.padding_idx is not None:
            return None
        return replace(self, pattern=pattern)

    def of_one_expert(self) -> Layout:
        """Return the layout of the matrix of one expert: this one without the axis `expert`."""
        return replace(self, pattern=self.pattern.removeprefix("expert "))

    def of_part(self, part: Sequence[tuple[int, int]]) -> Layout:
        """Return the layout of a part of a weight, a range (start, stop) for each of its axes.

        There, `padding_idx` counts from the first row of the part.
        """
        if self.padding_idx is None:
            return self
        start, stop = part[0]
        if start <= self.padding_idx < stop:
            return replace(self, padding_idx=self.padding_idx - start)
        return replace(self, padding_idx=None)

    def reason_against_shape(self, shape: Sequence[int]) -> str | None:
        """Return why a weight of a shape can't have this layout, or None if it can."""
        more_axes = len(shape) - len(self.axes)
        fits = more_axes == 0
        if self.has_kernel:  # `*kernel` stands for one axis or more
            fits = more_axes >= 0
        if not fits:
            return f"its shape {tuple(shape)} does not have the axes {self.pattern!r}"
        if self.pattern == "in out *kernel" and shape[0] % self.groups:
            return f"{self.groups} groups do not divide its {shape[0]} input channels"
        return None

    def reason_against(self, geometry: Geometry, r: int, r_out: int | None = None) -> str | None:
        """Return why a weight can't have a block of these sizes, or None if it can."""
        inputs = geometry.in_features
        outputs = geometry.out_features
        if not inputs or not outputs or 0 in geometry.stack:
            return "its weight is empty"
        if self.has_kernel:
            sizes = f"its {inputs} input channels per group", f"its {outputs} output channels"
        elif self.pattern == "index out":
            sizes = f"num_embeddings={inputs}", f"embedding_dim={outputs}"
        else:
            sizes = f"in_features={inputs}", f"out_features={outputs}"
        if r > inputs:
            return f"r={r} is larger than {sizes[0]}"
        if r_out is not None and outputs % r_out:
            return f"r_out={r_out} does not divide {sizes[1]}"
        return None

    def geometry(self, shape: Sequence[int], output_ranges: OutputRanges = ()) -> Geometry:
        """Return the sizes of a weight of this layout, or of its part with these outputs."""
        if self.has_kernel:
            first, second, *stack = shape
        else:
            *stack, first, second = shape
        inputs, out = (first, second) if self.in_first else (second, first)
        if self.pattern == "in out *kernel":
            inputs = inputs // self.groups
            stack = [self.groups, *stack]
        if output_ranges:
            out = sum(stop - start for start, stop in output_ranges)
        return self.geometry_of_stack(inputs, out, tuple(stack))

    def geometry_of_stack(
        self, in_features: int, out_features: int, stack: tuple[int, ...]
    ) -> Geometry:
        """Return the sizes of a weight of this layout with this stack."""
        kernel_axes = len(stack) if self.has_kernel else 0
        if self.pattern == "in out *kernel":
            kernel_axes -= 1  # its first axis is that of the groups
        return Geometry(in_features, out_features, stack, kernel_axes)

    def shape(self, geometry: Geometry) -> tuple[int, ...]:
        """Return the shape of a weight with these sizes: the inverse of `geometry`."""
        inputs = geometry.in_features
        out = geometry.out_features
        stack = geometry.stack
        if self.has_kernel:
            if self.in_first:
                return (self.groups * inputs, out, *stack[1:])
            return (out, inputs, *stack)
        return (*stack, inputs, out) if self.in_first else (*stack, out, inputs)

    def matrices(self, weight: Tensor) -> Tensor:
        """Return a weight as its stack of matrices (..., out, in), as a view where possible."""
        if self.has_kernel:
            if self.in_first:
                grouped = torch.unflatten(weight, 0, (self.groups, -1))
                return grouped.movedim((2, 1), (-2, -1))
            return weight.movedim((0, 1), (-2, -1))
        return weight.transpose(-2, -1) if self.in_first else weight

    def weight(self, matrices: Tensor) -> Tensor:
        """Return a stack of matrices (..., out, in) as a weight: the inverse of `matrices`."""
        if self.has_kernel:
            if self.in_first:
                return matrices.movedim((-2, -1), (2, 1)).flatten(0, 1)
            return matrices.movedim((-2, -1), (0, 1))
        return matrices.transpose(-2, -1) if self.in_first else matrices

    def part(self, weight: Tensor, output_ranges: OutputRanges) -> Tensor:
        """Return the part of a weight with these outputs, as a view if they are one range."""
        if not output_ranges:
            return weight
        matrices = self.matrices(weight)
        parts = [matrices.narrow(-2, first, stop - first) for first, stop in output_ranges]
        if len(parts) == 1:
            return self.weight(parts[0])
        return self.weight(torch.cat(parts, -2))


MATRIX = Layout("out in")
STACK = Layout("expert out in")


def layout_of(pattern: object) -> Layout:
    """Return the layout with a pattern.

    Args:
        pattern: one of `PATTERNS`; white space does not matter. A `Layout` is returned as it is.

    Raises:
        ArgumentError: there is no such layout.
        ArgumentTypeError: `pattern` is not a str.

    Examples:
        >>> from disha.functional import layout_of
        >>> layout_of("expert in out").transposed().pattern
        'expert out in'
    """
    if isinstance(pattern, Layout):
        return pattern
    if not isinstance(pattern, str):
        raise ArgumentTypeError(
            f"a layout must be a str such as 'out in', got {pattern!r} of type "
            f"{type(pattern).__name__}"
        )
    normal = " ".join(pattern.split())
    if normal not in PATTERNS:
        raise ArgumentError(
            f"unknown layout {pattern[:80]!r}; allowed are {', '.join(map(repr, PATTERNS))}"
        )
    return Layout(normal)


def place_outputs(part: Tensor, output_ranges: OutputRanges, size: int, dim: int = -2) -> Tensor:
    """Put what belongs to the outputs in ranges among all `size` outputs; the others get zeros."""
    if not output_ranges:
        return part
    shape = list(part.shape)
    shape[dim] = size
    whole = part.new_full(shape, -0.0)  # x + -0.0 keeps every bit of x, also of -0.0
    position = 0  # in the part
    for first, stop in output_ranges:
        count = stop - first
        whole.narrow(dim, first, count).copy_(part.narrow(dim, position, count))
        position += count
    return whole
