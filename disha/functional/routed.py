"""The shard-sum updates of a batch in which each run of samples has its own block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from disha.functional.shards import scaled, shard_sums


def with_bone_of_runs(
    output: Tensor,
    x: Tensor,
    runs: Sequence[tuple[Tensor | None, int]],
    order: Tensor | None = None,
) -> Tensor:
    """Return an output (n, rows, out) plus S(x) s R, with the s R of each run, all of one shape.

    `order` are indices along the leading dimension that sort its entries by run. Without them, the
    output is changed in place; it must be contiguous, without gradients, and of the dtype of x.
    """
    first = next(own for own, _ in runs if own is not None)
    sums, regain = shard_sums(x, first.shape[0])
    sizes = [size for _, size in runs]
    matrices = [None if own is None else own.to(x.dtype) for own, _ in runs]
    if order is None:
        each = zip(matrices, torch.split(output, sizes), torch.split(sums, sizes), strict=True)
        for matrix, rows, own in each:
            if matrix is not None:
                rows.view(-1, rows.shape[-1]).addmm_(own.flatten(0, 1), matrix, alpha=regain)
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
