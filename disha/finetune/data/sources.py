"""The batches of every epoch, in an order set by the seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TypeVar

from disha.finetune.data.batches import TextRow, TokenBatch, collate, packed
from disha.finetune.data.examples import Example, StoredExamples
from disha.finetune.data.order import permutation

__all__ = ["TextBatches"]

T = TypeVar("T")

SORTED_BATCHES = 50
"""How many batches are sorted by length together while shuffling."""

PACKED_TOGETHER = 1024
"""How many examples are packed together; more leave fewer gaps and take more time."""


@dataclass(frozen=True)
class TextBatches:
    """Batches of examples, shuffled again in every epoch.

    Without packing, examples may be sorted by length within windows of some batches, so that
    examples of similar length share a batch with little padding. Then the batches of a window are
    shuffled.
    With packing, examples that are close together in the shuffled order share rows. So the contents
    of rows change from epoch to epoch, and the number of rows changes a little.

    Args:
        examples: the examples of an epoch.
        size: rows per batch; the last batch may be smaller.
        seed: decides the order.
        row_length: pack examples into rows of at most this many tokens; an example may have one
            token more. None gives each example a row of its own.
        by_length: sort by length, where rows are not packed.
    """

    examples: StoredExamples
    size: int
    seed: int
    row_length: int | None = None
    by_length: bool = True

    def batches(self, epoch: int) -> Iterator[Sequence[TextRow]]:
        """Yield the batches of an epoch, counted from 1."""
        seed = self.seed + epoch
        examples = self.examples.shuffled(seed)
        if self.row_length is None:
            together = SORTED_BATCHES if self.by_length else 1
            return _batches_by_length(examples, self.size, together, seed)
        return _packed_batches(examples, self.row_length, self.size, seed)

    def batches_per_epoch(self) -> int:
        """How many batches an epoch has; with packing, later epochs may have a few more or less."""
        if self.row_length is None:
            return math.ceil(sum(self.examples.drawn) / self.size)
        return self._batches_at_first

    def digest(self) -> str:
        """Return a hash of all rows."""
        return self.examples.digest()

    def weight(self, batch: Sequence[TextRow]) -> int:
        """How many tokens of a batch are learned."""
        return sum(example.supervised for row in batch for example in row)

    def collate(self, batch: Sequence[TextRow]) -> TokenBatch:
        """Return a batch as a model takes it."""
        return collate(batch, positions=self.row_length is not None)

    @cached_property
    def _batches_at_first(self) -> int:
        return sum(1 for _ in self.batches(1))


def _batches_by_length(
    examples: Iterable[Example], size: int, together: int, seed: int
) -> Iterator[Sequence[TextRow]]:
    window_size = size * together
    for number, window in enumerate(_windows(examples, window_size)):
        window.sort(key=lambda example: len(example.tokens))
        parts = [window[i : i + size] for i in range(0, len(window), size)]
        for part in permutation(len(parts), seed + number * window_size):
            yield [(example,) for example in parts[part]]


def _packed_batches(
    examples: Iterable[Example], row_length: int, size: int, seed: int
) -> Iterator[Sequence[TextRow]]:
    waiting: list[TextRow] = []
    for number, window in enumerate(_windows(examples, PACKED_TOGETHER)):
        rows = packed(window, row_length)
        waiting.extend(rows[index] for index in permutation(len(rows), seed + number))
        while len(waiting) >= size:
            yield waiting[:size]
            del waiting[:size]
    if waiting:
        yield waiting


def _windows(items: Iterable[T], size: int) -> Iterator[list[T]]:
    remaining = iter(items)
    while window := list(islice(remaining, size)):
        yield window
