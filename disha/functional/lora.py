"""LoRA: the block D is A (r, in) beside B^T (r, out), and dW = B A.

One tensor holds both factors, so that a LoRA is one parameter, one key in a file and one row of
every table, as the blocks of other methods are. Row k of D has all numbers of rank k, so ranks are
added and padded as rows are. Optimizers that go number by number, such as AdamW, train A and B as
if they were apart. One that looks at a matrix, such as Muon, sees the two beside each other.

Over a convolution, A is a convolution with r outputs, of the kernel of W, and B mixes its outputs
at each position: D is (r, in * kernel + out), as the files of PEFT and of image models have it.

alpha / r of other libraries is the scale s here.

Source: Hu et al., "LoRA", arXiv 2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from disha.errors import ArgumentError
from disha.functional.layouts import MATRIX, Geometry, Layout
from disha.functional.method import Down, Method


class _Lora(Method):
    name = "lora"
    low_rank = True
    spans_kernel = True

    def shape(self, geometry: Geometry, r: int, r_out: int | None) -> tuple[int, ...]:
        stack = geometry.stack_without_kernel()
        return (*stack, r, _inputs_of(geometry) + geometry.out_features)

    def start(self, block: Tensor, geometry: Geometry, layout: Layout) -> None:
        """Start as PEFT does: one factor is random, and the other zero."""
        a, b = _split(block, geometry)
        if layout.pattern == "index out":  # a row of A that is looked up seldom would learn slowly
            a.zero_()
            nn.init.normal_(b)
        else:
            bound = _inputs_of(geometry) ** -0.5  # of nn.Linear, and so of kaiming_uniform_
            nn.init.uniform_(a, -bound, bound)
            b.zero_()

    def factors(self, block: Tensor, geometry: Geometry) -> tuple[Down, Tensor]:
        a, b = _split(block, geometry)
        kernel = geometry.kernel()
        if not kernel:
            return a, b
        a = torch.unflatten(a, -1, (geometry.in_features, *kernel))  # (..., r, in, *kernel)
        first = -2 - len(kernel)
        a = a.movedim((first, first + 1), (-2, -1))  # (..., *kernel, r, in)
        ones = (1,) * len(kernel)
        return a, b.reshape(*b.shape[:-2], *ones, *b.shape[-2:])

    def from_factors(self, a: Tensor, b: Tensor, r: int) -> Tensor | None:
        return torch.cat([a, b.mT], -1) if b.shape[-1] == r else None

    def step(self, inputs: int, r: int) -> float:
        return 5 * r / math.sqrt(3)  # A moves too; measured in benchmarks/convergence/transfer.py

    def of_outputs(self, block: Tensor, start: int, stop: int, geometry: Geometry) -> Tensor | None:
        a, b = _split(block, geometry)
        return torch.cat([a, b[..., start:stop]], -1)

    def of_inputs(self, block: Tensor, start: int, stop: int, geometry: Geometry) -> Tensor | None:
        a, b = _split(block, geometry)
        return None if geometry.kernel_axes else torch.cat([a[..., start:stop], b], -1)

    def widen(self, block: Tensor, geometry: Geometry, r: int, wider: int) -> Tensor | None:
        if wider < r:
            return None
        rows = block.new_empty(*block.shape[:-2], wider - r, block.shape[-1])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(r)  # every rank reads the file, and gets the same A
            self.start(rows, geometry, MATRIX)  # B is zero, and A is not, so that they learn
        return torch.cat([block, rows], -2)

    def join(self, terms: Sequence[tuple[Tensor, float]], geometry: Geometry) -> Tensor | None:
        blocks = []
        for block, multiplier in terms:
            a, b = _split(block, geometry)
            blocks.append(torch.cat([a, multiplier * b], -1))
        return torch.cat(blocks, -2)

    def reason_against(
        self, layout: Layout, geometry: Geometry, r: int, r_out: int | None
    ) -> str | None:
        # r cuts nothing here, so it may be larger than the inputs.
        return super().reason_against(layout, geometry, min(r, geometry.in_features), r_out)


def _inputs_of(geometry: Geometry) -> int:
    """Return how many inputs a row of A has, at all positions of a kernel."""
    return geometry.in_features * math.prod(geometry.kernel())


def _split(block: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Return A (..., r, in * kernel) and B^T (..., r, out)."""
    sizes = [_inputs_of(geometry), geometry.out_features]
    if block.shape[-1] != sum(sizes):
        raise ArgumentError(
            f"a lora block of shape {tuple(block.shape)} does not fit a weight with {sizes[0]} "
            f"inputs and {sizes[1]} outputs"
        )
    a, b = torch.split(block, sizes, -1)
    return a, b


LORA = _Lora()
