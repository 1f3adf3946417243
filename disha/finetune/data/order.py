"""The order of rows, which a seed decides.

Rows that can only be read in blocks, as those of Parquet files, are mixed within some blocks at a
time, as many as can be kept in memory; the blocks come in any order. Rows that can be read one by
one, and few blocks, are mixed without such bounds.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence

import torch

from disha.finetune.data.rows import Block, Row, Rows

__all__ = ["permutation", "reading_order"]

CHUNK = 65536

MOST_BYTES_MIXED = 64 * 2**20
"""How much is mixed at a time; less than what is kept, as blocks take more room in memory."""


def permutation(count: int, seed: int) -> array[int]:
    """The numbers up to `count` in an order that `seed` decides; 8 bytes each."""
    generator = torch.Generator().manual_seed(seed)
    order = array("q")
    for chunk in torch.split(torch.randperm(count, generator=generator), CHUNK):
        order.extend(chunk.tolist())
    return order


def reading_order(rows: Sequence[Row], seed: int) -> array[int]:
    """The numbers of rows in an order that `seed` decides and that reads every block once."""
    if not isinstance(rows, Rows) or not rows.is_in_blocks:
        return permutation(len(rows), seed)
    blocks = _blocks(rows)
    if sum(block.size for block in blocks if block is not None) <= MOST_BYTES_MIXED:
        return permutation(len(rows), seed)
    order = array("q")
    for mixed in _mixed_blocks(blocks, seed):
        together = array("q")
        for block in mixed:
            together.extend(blocks[block])
        order.extend(together[index] for index in permutation(len(together), seed + len(order)))
    return order


def _blocks(rows: Rows) -> Mapping[Block | None, array[int]]:
    blocks: dict[Block | None, array[int]] = {}
    for index in range(len(rows)):
        blocks.setdefault(rows.block(index), array("q")).append(index)
    return blocks


def _mixed_blocks(
    blocks: Mapping[Block | None, Sequence[int]], seed: int
) -> Iterator[Sequence[Block | None]]:
    names, mixed, size = tuple(blocks), list[Block | None](), 0
    for index in permutation(len(names), seed):
        block = names[index]
        following = 0 if block is None else block.size
        if mixed and size + following > MOST_BYTES_MIXED:
            yield mixed
            mixed, size = [], 0
        mixed.append(block)
        size += following
    yield mixed
