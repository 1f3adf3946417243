"""Products of some rows with matrices of their own, added where the rows are.

    y[rows] += f x[rows] M    for each (rows, M), with x (n, k), M (k, out) and y (n, out)

Rows that are neighbours are a slice, and their product is added in place: nothing is gathered,
sorted or copied. Other rows are indices, of which only the product is a new tensor. The gradient of
x is such a sum again, with M^H in place of M.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from disha.functional.shard_sums import scaled, without_autocast

Rows = slice | Tensor
"""Some rows of a matrix: neighbours, or any by their indices."""


def add_row_products(
    output: Tensor,
    x: Tensor,
    rows: Sequence[Rows],
    matrices: Sequence[Tensor],
    factor: float = 1.0,
) -> Tensor:
    """Write the products of some rows into an output, which must be new, and return it.

    All tensors have one dtype. No row may stand twice in one of the `rows`.
    """
    return _AddRowProducts.apply(output, x, rows, factor, *matrices)  # type: ignore[no-untyped-call]


class _AddRowProducts(torch.autograd.Function):
    """(y, x, rows, f, *M) -> y."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, rows: Sequence[Rows], factor: float, *matrices: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, *matrices)
        ctx.rows, ctx.factor = rows, factor
        ctx.mark_dirty(output)
        with without_autocast(output):
            for part, matrix in zip(rows, matrices, strict=True):
                if isinstance(part, slice):
                    output[part].addmm_(x[part], matrix, alpha=factor)
                else:
                    output.index_add_(0, part, x.index_select(0, part) @ matrix, alpha=factor)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, *matrices = ctx.saved_tensors
        _, needs_x, _, _, *need_matrices = ctx.needs_input_grad
        grad_x = None
        if needs_x:
            transposed = [matrix.mH for matrix in matrices]
            grad_x = add_row_products(x.new_zeros(x.shape), grad, ctx.rows, transposed, ctx.factor)
        grad_matrices = []
        with without_autocast(grad):
            for part, needs_matrix in zip(ctx.rows, need_matrices, strict=True):
                product = _select(x, part).mH @ _select(grad, part) if needs_matrix else None
                grad_matrices.append(None if product is None else scaled(product, ctx.factor))
        return grad, grad_x, None, None, *grad_matrices


def _select(x: Tensor, rows: Rows) -> Tensor:
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)
