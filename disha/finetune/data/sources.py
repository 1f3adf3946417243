"""The batches of every epoch, in an order that the seed decides."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from disha.finetune.data.batches import TokenBatch, collate
from disha.finetune.data.examples import Example

__all__ = ["ShuffledExamples", "permutation"]

SORTED_BATCHES = 16
"""How many batches are sorted by length together while shuffling."""


@dataclass(frozen=True)
class ShuffledExamples:
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
        order = permutation(len(self.examples), self.seed + epoch)
        for start in range(0, len(order), self.size * SORTED_BATCHES):
            window = sorted(
                order[start : start + self.size * SORTED_BATCHES],
                key=lambda index: len(self.examples[index].tokens),
            )
            parts = [window[i : i + self.size] for i in range(0, len(window), self.size)]
            for part in permutation(len(parts), self.seed + epoch + start):
                yield [self.examples[index] for index in parts[part]]

    def batches_per_epoch(self) -> int:
        """How many batches an epoch has."""
        return math.ceil(len(self.examples) / self.size)

    def weight(self, batch: Sequence[Example]) -> int:
        """How many tokens of a batch are learned."""
        return sum(example.supervised for example in batch)

    def collate(self, batch: Sequence[Example]) -> TokenBatch:
        """Return a batch as a model takes it."""
        return collate(batch)


def permutation(count: int, seed: int) -> list[int]:
    """The numbers up to `count` in an order that `seed` decides."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator).tolist()
