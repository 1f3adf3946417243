"""The batches of every epoch, in an order that the seed decides: of examples in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TypeVar

from disha.finetune.data.batches import TokenBatch, collate, collate_packed
from disha.finetune.data.examples import Example
from disha.finetune.data.order import permutation
from disha.finetune.data.packing import packed

__all__ = [
    "OfExamples",
    "OfPackedRows",
    "PackedExamples",
    "PackedRow",
    "ShuffledExamples",
    "batches_by_length",
    "packed_batches",
]

T = TypeVar("T")

SORTED_BATCHES = 16
"""How many batches are sorted by length together while shuffling."""

PACKED_TOGETHER = 1024
"""How many examples are packed together; more leave fewer gaps and take more time."""

PackedRow = tuple[Example, ...]


class OfExamples:
    """What sources of batches of examples share."""

    def weight(self, batch: Sequence[Example]) -> int:
        """How many tokens of a batch are learned."""
        return sum(example.supervised for example in batch)

    def collate(self, batch: Sequence[Example]) -> TokenBatch:
        """Return a batch as a model takes it."""
        return collate(batch)


class OfPackedRows:
    """What sources of batches of packed rows share."""

    def weight(self, batch: Sequence[PackedRow]) -> int:
        """How many tokens of a batch are learned."""
        return sum(example.supervised for row in batch for example in row)

    def collate(self, batch: Sequence[PackedRow]) -> TokenBatch:
        """Return a batch as a model takes it."""
        return collate_packed(batch)


@dataclass(frozen=True)
class ShuffledExamples(OfExamples):
    """Examples in memory, shuffled anew in every epoch.

    They are sorted by length within windows of a few batches, so that examples of like length share
    a batch and little is padding; then the batches of a window are shuffled.

    Args:
        examples: all of them.
        size: examples per batch; the last may be smaller.
        seed: decides the order.
    """

    examples: Sequence[Example]
    size: int
    seed: int

    def batches(self, epoch: int) -> Iterator[Sequence[Example]]:
        """Yield the batches of an epoch, counted from 1."""
        seed = self.seed + epoch
        return batches_by_length(_shuffled(self.examples, seed), self.size, seed)

    def batches_per_epoch(self) -> int:
        """How many batches an epoch has."""
        return math.ceil(len(self.examples) / self.size)


@dataclass(frozen=True)
class PackedExamples(OfPackedRows):
    """Examples in memory, shuffled anew in every epoch and packed into rows.

    Examples that follow each other in the shuffled order are packed together, some hundreds at a
    time, so that what shares a row changes from epoch to epoch. So does the number of rows, a
    little.

    Args:
        examples: all of them; each has at most `max_length` + 1 tokens.
        size: rows per batch; the last batch may be smaller.
        seed: decides the order.
        max_length: most tokens per row.
    """

    examples: Sequence[Example]
    size: int
    seed: int
    max_length: int

    def batches(self, epoch: int) -> Iterator[Sequence[PackedRow]]:
        """Yield the batches of an epoch, counted from 1."""
        seed = self.seed + epoch
        return packed_batches(_shuffled(self.examples, seed), self.max_length, self.size, seed)

    def batches_per_epoch(self) -> int:
        """How many batches the first epoch has; later ones may have a few more or less."""
        return self._batches_of_first_epoch

    @cached_property
    def _batches_of_first_epoch(self) -> int:
        return sum(1 for _ in self.batches(1))


def batches_by_length(
    examples: Iterable[Example], size: int, seed: int
) -> Iterator[Sequence[Example]]:
    """Batches of examples of like length, which come in any order.

    Args:
        examples: in an order of chance; some batches of them are held at once.
        size: examples per batch; the last may be smaller.
        seed: decides the order of batches.
    """
    together = size * SORTED_BATCHES
    for number, window in enumerate(_windows(examples, together)):
        window.sort(key=lambda example: len(example.tokens))
        parts = [window[i : i + size] for i in range(0, len(window), size)]
        for part in permutation(len(parts), seed + number * together):
            yield parts[part]


def packed_batches(
    examples: Iterable[Example], max_length: int, size: int, seed: int
) -> Iterator[Sequence[PackedRow]]:
    """Batches of rows that several examples share.

    Args:
        examples: in an order of chance; some hundreds of them are held at once.
        max_length: most tokens per row.
        size: rows per batch; the last batch may be smaller.
        seed: decides the order of rows.
    """
    waiting: list[PackedRow] = []
    for number, window in enumerate(_windows(examples, PACKED_TOGETHER)):
        rows = packed(window, max_length)
        waiting.extend(rows[index] for index in permutation(len(rows), seed + number))
        while len(waiting) >= size:
            yield waiting[:size]
            del waiting[:size]
    if waiting:
        yield waiting


def _shuffled(examples: Sequence[T], seed: int) -> Iterator[T]:
    return (examples[index] for index in permutation(len(examples), seed))


def _windows(items: Iterable[T], size: int) -> Iterator[list[T]]:
    remaining = iter(items)
    while window := list(islice(remaining, size)):
        yield window
