"""The order of rows, which a seed decides.

Rows of Parquet files can only be read in groups. Some groups at a time, as many as stay in memory,
are mixed with each other; the groups come in random order. All other rows, and the rows of a few
groups, are mixed without such bounds.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence

import torch

from disha.finetune.data.parquet import Group, ParquetRows
from disha.finetune.data.rows import Rows

__all__ = ["permutation", "reading_order"]

CHUNK = 65536

MOST_BYTES_MIXED = 64 * 2**20
"""How much is mixed at a time; less than what is kept, as groups take more room in memory."""


def permutation(count: int, seed: int) -> array[int]:
    """The numbers below `count` in an order that `seed` decides; 8 bytes each."""
    generator = torch.Generator().manual_seed(seed)
    order = array("q")
    for chunk in torch.split(torch.randperm(count, generator=generator), CHUNK):
        order.extend(chunk.tolist())
    return order


def reading_order(rows: Rows, seed: int) -> array[int]:
    """The numbers of rows in an order that `seed` decides and that reads every group once."""
    if not any(isinstance(file, ParquetRows) for file in rows.files):
        return permutation(len(rows), seed)
    groups = _rows_by_group(rows)
    if sum(map(_size, groups)) <= MOST_BYTES_MIXED:
        return permutation(len(rows), seed)
    order = array("q")
    for mixed in _mixed_groups(groups, seed):
        together = array("q")
        for group in mixed:
            together.extend(groups[group])
        order.extend(together[index] for index in permutation(len(together), seed + len(order)))
    return order


def _rows_by_group(rows: Rows) -> Mapping[Group | None, array[int]]:
    """The rows of each group; under None, those that can be read alone."""
    groups: dict[Group | None, array[int]] = {}
    for index in range(len(rows)):
        file, number = rows.find(index)
        group = file.group(number) if isinstance(file, ParquetRows) else None
        groups.setdefault(group, array("q")).append(index)
    return groups


def _mixed_groups(
    groups: Mapping[Group | None, Sequence[int]], seed: int
) -> Iterator[list[Group | None]]:
    names, mixed = list(groups), list[Group | None]()
    for index in permutation(len(names), seed):
        group = names[index]
        if mixed and sum(map(_size, mixed)) + _size(group) > MOST_BYTES_MIXED:
            yield mixed
            mixed = []
        mixed.append(group)
    yield mixed


def _size(group: Group | None) -> int:
    return 0 if group is None else group.size
