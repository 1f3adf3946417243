"""Statistics of the tensors in adapter files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from disha import functional
from disha.files.checksum import check_values
from disha.files.header import AdapterFile
from disha.files.tensors import opened
from disha.records import LayerRecord

__all__ = ["TensorStatistics", "chunks", "delta_norm", "statistics_of", "tensor_statistics"]

CHUNK = 1 << 20
"""Number of values that are processed at once, to limit the memory."""


@dataclass(frozen=True)
class TensorStatistics:
    """A few statistics of the values of one tensor.

    Attributes:
        norm: Frobenius norm, or None if values are not finite.
        rms: root of the mean square, or None if values are not finite.
        largest: largest absolute value, or None if values are not finite.
        zeros: number of values that are zero.
        not_finite: number of values that are NaN or infinite.
        delta_norm: the Frobenius norm of s * dW of a block; None if values are not finite, or if dW
            depends on W, which the file does not contain.
    """

    norm: float | None
    rms: float | None
    largest: float | None
    zeros: int
    not_finite: int
    delta_norm: float | None = None


def statistics_of(described: AdapterFile) -> Iterator[tuple[str, TensorStatistics]]:
    """Iterate over the keys of a file's tensors and their statistics, blocks first.

    Tensors are read one at a time.

    Args:
        described: the header of the file.

    Raises:
        AdapterFileError: the file is damaged.
        AdapterIOError: the file can't be read any more.
    """
    records = {layer.key: layer for layer in described.layers}
    with opened(described.path) as file:
        check_values(file)
        for key in (*records, *described.also_train):
            yield key, tensor_statistics(file.read(key), records.get(key))


def chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Iterate over the values of a tensor in parts of bounded size."""
    flat = tensor.detach().flatten()
    for start in range(0, len(flat), CHUNK):
        yield flat[start : start + CHUNK]


def tensor_statistics(tensor: Tensor, record: LayerRecord | None = None) -> TensorStatistics:
    """Return the statistics of a tensor.

    Args:
        tensor: any floating-point tensor.
        record: the layer of a block.

    Examples:
        >>> import torch
        >>> from disha.files.statistics import tensor_statistics
        >>> tensor_statistics(torch.tensor([3.0, -4.0, 0.0, 0.0])).norm
        5.0
    """
    squares, largest, zeros, not_finite = 0.0, 0.0, 0, 0
    for chunk in chunks(tensor):
        not_finite += int((~chunk.isfinite()).sum())
        zeros += int((chunk == 0).sum())
        wide = chunk.double()
        squares += float(wide.square().sum())
        largest = max(largest, float(wide.abs().max()))
    if not_finite:
        return TensorStatistics(None, None, None, zeros, not_finite)
    return TensorStatistics(
        norm=math.sqrt(squares),
        rms=math.sqrt(squares / max(tensor.numel(), 1)),
        largest=largest,
        zeros=zeros,
        not_finite=0,
        delta_norm=None if record is None else delta_norm(record, tensor),
    )


def delta_norm(record: LayerRecord, block: Tensor) -> float | None:
    """Return the Frobenius norm of s * dW, or None if dW depends on W.

    ||dW||^2 = t * sum over j of c_j ||D_j||^2, with c_j the number of inputs i with i mod r = j
    and t = out / r_out (1 without a tile). So dW is never formed. An input that gets no update
    (padding_idx) does not count.

    Args:
        record: the layer.
        block: its block.

    Examples:
        >>> import torch
        >>> from disha.records import LayerRecord
        >>> from disha.files.statistics import delta_norm
        >>> from disha.functional import Layout
        >>> linear = Layout("out in")
        >>> record = LayerRecord("0", "bone", 2, None, 4, 1, scale=1.0, base=None, layout=linear)
        >>> delta_norm(record, torch.tensor([[3.0], [4.0]]))  # dW = [3, 4, 3, 4]
        7.0710678118654755
    """
    method = functional.method_of(record.method)
    if not method.reduces:
        return None
    matrices = method.matrix_block(record.layout, block.detach().double())
    by_shard_row = matrices.square().sum(-1).view(-1, record.r).sum(0)
    # Not a sum over the inputs: their number is only in the header, and can be huge.
    rows = torch.arange(record.r, device=block.device)
    counts = (record.in_features - rows + record.r - 1) // record.r
    if record.layout.padding_idx is not None:
        counts[record.layout.padding_idx % record.r] -= 1
    tiles = record.out_features // (record.r_out or record.out_features)
    return abs(record.scale) * math.sqrt(tiles * float(by_shard_row @ counts.double()))
