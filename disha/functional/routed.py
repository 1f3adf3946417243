"""Products of a batch in which each sample has its own updates.

A run is a part of the leading dimension whose entries share their updates. The cheapest way depends
on the methods:

- all of them reduce: W x of all runs at once, and S(x) of all runs; each run adds S(x) R;
- otherwise: one product for each run, as if the runs were separate batches.

Source: arXiv 2409.15371, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from disha.functional.products import Update, adapted_linear
from disha.functional.shards import scaled, shard_sums


def linear_of_runs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    runs: Sequence[tuple[Sequence[Update], int]],
    order: Tensor,
) -> Tensor:
    """Return (W + sum of s dW) x + b, with the updates of each run.

    `order` are indices along the leading dimension that sort its entries by run.
    """
    sizes, updates = [size for _, size in runs], [own for own, _ in runs]
    parts = [
        adapted_linear(x.index_select(0, rows), weight, bias, own)
        for rows, own in zip(torch.split(order, sizes), updates, strict=True)
    ]
    together = torch.cat(parts)
    return torch.empty_like(together).index_copy(0, order, together)


def with_bone_of_runs(
    output: Tensor,
    x: Tensor,
    runs: Sequence[tuple[Tensor | None, int]],
    order: Tensor | None = None,
) -> Tensor:
    """Return an output (n, rows, out) plus S(x) s R, with the s R of each run, all of one shape.

    Without gradients, the output is changed in place; it must be contiguous if there is no order.
    """
    first = next(own for own, _ in runs if own is not None)
    sums, regain = shard_sums(x, first.shape[0])
    sizes = [size for _, size in runs]
    matrices = [None if own is None else own.to(x.dtype) for own, _ in runs]
    if order is None:
        each = zip(matrices, torch.split(output, sizes), torch.split(sums, sizes), strict=True)
        for matrix, rows, own in each:
            if matrix is not None:
                _add(rows.view(-1, rows.shape[-1]), own.flatten(0, 1), matrix, regain)
        return output
    parts = torch.split(sums.index_select(0, order), sizes)
    deltas = [
        own.new_zeros(*own.shape[:-1], first.shape[1]) if matrix is None else own @ matrix
        for own, matrix in zip(parts, matrices, strict=True)
    ]
    delta = scaled(torch.cat(deltas), regain).to(output.dtype)
    if torch.is_grad_enabled():
        return output.index_add(0, order, delta)
    return output.index_add_(0, order, delta)


def _add(rows: Tensor, sums: Tensor, matrix: Tensor, regain: float) -> None:
    """Add a product to rows of an output, in place."""
    if rows.dtype == sums.dtype:
        rows.addmm_(sums, matrix, alpha=regain)
    else:
        rows += scaled(sums @ matrix, regain).to(rows.dtype)
