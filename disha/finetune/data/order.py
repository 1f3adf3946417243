"""The order of rows, set by a seed.

Rows of Parquet files can only be read in groups. If their groups don't all fit in memory, they come
in random order, and only groups that fit in memory together are mixed with each other. In any other
case, all rows are mixed.
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
"""How many bytes are mixed at a time; fewer than are kept, because groups grow in memory."""


def permutation(count: int, seed: int) -> array[int]:
    """Return the numbers below `count` in a random order, set by `seed`; 8 bytes each."""
    generator = torch.Generator().manual_seed(seed)
    order = array("q")
    for chunk in torch.split(torch.randperm(count, generator=generator), CHUNK):
        order.extend(chunk.tolist())
    return order


def reading_order(rows: Rows, seed: int) -> array[int]:
    """Return the numbers of rows in a random order, set by `seed`, that reads each group once."""
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
    """Return the rows of each group; None stands for rows that can be read alone."""
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
