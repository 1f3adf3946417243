"""Examples side by side, as models take them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from disha.finetune.data.examples import IGNORED, Example

__all__ = ["Batch", "BatchSource", "TokenBatch", "batch_by_length", "collate", "collate_packed"]

T = TypeVar("T")


class Batch(Protocol):
    """What an objective takes."""

    @property
    def size(self) -> int:
        """How much work the batch is: tokens without padding, or samples."""

    @property
    def weight(self) -> int:
        """How many terms its summed loss has."""

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""


class BatchSource(Protocol[T]):
    """The batches of every epoch. What is in which batch depends on seed and epoch alone."""

    def batches(self, epoch: int) -> Iterator[Sequence[T]]:
        """Yield the batches of an epoch, counted from 1, not yet collated."""

    def batches_per_epoch(self) -> int | None:
        """How many batches an epoch has; None where only reading all rows would tell."""

    def weight(self, batch: Sequence[T]) -> int:
        """How many terms the loss of a batch has."""

    def collate(self, batch: Sequence[T]) -> Batch:
        """Return a batch as a model takes it."""


@dataclass(frozen=True)
class TokenBatch:
    """Rows of token ids, padded on the right.

    Args:
        tokens: (batch, time) token ids; padding is 0.
        labels: (batch, time) the token that should follow each one, or `IGNORED`.
        positions: (batch, time) the place of each token in its own text, which begins at 0, where
            several texts are packed into a row; None where every row is one text.
        size: how many of `tokens` are not padding.
        weight: how many of `labels` count in the loss.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor | None
    size: int
    weight: int

    def to(self, device: torch.device) -> TokenBatch:
        """Return the batch on a device."""
        positions = None if self.positions is None else self.positions.to(device)
        return TokenBatch(
            self.tokens.to(device), self.labels.to(device), positions, self.size, self.weight
        )


def collate(examples: Sequence[Example]) -> TokenBatch:
    """Put examples side by side; labels are the tokens moved one place ahead."""
    return _laid_out([[example] for example in examples], positions=False)


def collate_packed(rows: Sequence[Sequence[Example]]) -> TokenBatch:
    """Put rows of several examples each side by side."""
    return _laid_out(rows, positions=True)


def batch_by_length(examples: Sequence[Example], size: int) -> Iterator[TokenBatch]:
    """Batches of `size`, longest first, so that little is padding and memory peaks at once."""
    ordered = sorted(examples, key=lambda example: len(example.tokens), reverse=True)
    for start in range(0, len(ordered), size):
        yield collate(ordered[start : start + size])


def _laid_out(rows: Sequence[Sequence[Example]], *, positions: bool) -> TokenBatch:
    time = max(sum(len(example.tokens) - 1 for example in row) for row in rows)
    tokens = torch.zeros(len(rows), time, dtype=torch.int64)
    labels = torch.full((len(rows), time), IGNORED, dtype=torch.int64)
    places = torch.zeros(len(rows), time, dtype=torch.int64)
    for row, examples in enumerate(rows):
        start = 0
        for example in examples:
            ids, length = torch.tensor(example.tokens), len(example.tokens) - 1
            tokens[row, start : start + length] = ids[:-1]
            places[row, start : start + length] = torch.arange(length)
            for first, end in example.learned:
                labels[row, start + first - 1 : start + end - 1] = ids[first:end]
            start += length
        places[row, start:] = torch.arange(time - start)  # padding is a text of its own
    return TokenBatch(
        tokens,
        labels,
        places if positions else None,
        size=sum(len(example.tokens) - 1 for row in rows for example in row),
        weight=sum(example.supervised for row in rows for example in row),
    )
