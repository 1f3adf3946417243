"""Examples side by side, as models take them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from disha.finetune.data.examples import IGNORED, Example

__all__ = [
    "Batch",
    "BatchSource",
    "TextRow",
    "TokenBatch",
    "batch_by_length",
    "collate",
    "first_fit",
    "packed",
]

T = TypeVar("T")

TextRow: TypeAlias = Sequence[Example]
"""What stands in one row of a batch: one text, or several where texts are packed."""


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


def collate(rows: Sequence[TextRow], *, positions: bool = False) -> TokenBatch:
    """Put rows side by side; labels are the tokens moved one place ahead.

    Args:
        rows: of one text each, or of several.
        positions: whether to tell where each text begins; needed for rows of several.
    """
    time = max(sum(len(example.tokens) - 1 for example in row) for row in rows)
    tokens = torch.zeros(len(rows), time, dtype=torch.int64)
    labels = torch.full((len(rows), time), IGNORED, dtype=torch.int64)
    places = torch.zeros(len(rows), time, dtype=torch.int64)
    for number, row in enumerate(rows):
        start = 0
        for example in row:
            ids, length = torch.tensor(example.tokens), len(example.tokens) - 1
            tokens[number, start : start + length] = ids[:-1]
            places[number, start : start + length] = torch.arange(length)
            for first, end in example.learned:
                labels[number, start + first - 1 : start + end - 1] = ids[first:end]
            start += length
        places[number, start:] = torch.arange(time - start)  # padding is a text of its own
    return TokenBatch(
        tokens,
        labels,
        places if positions else None,
        size=sum(len(example.tokens) - 1 for row in rows for example in row),
        weight=sum(example.supervised for row in rows for example in row),
    )


def batch_by_length(examples: Sequence[Example], size: int) -> Iterator[TokenBatch]:
    """Batches of `size`, longest first, so that little is padding and memory peaks at once."""
    ordered = sorted(examples, key=lambda example: len(example.tokens), reverse=True)
    for start in range(0, len(ordered), size):
        yield collate([[example] for example in ordered[start : start + size]])


def packed(examples: Sequence[Example], capacity: int) -> list[TextRow]:
    """Put examples into rows of at most `capacity` tokens to predict from.

    An example needs one place less than it has tokens, as nothing is predicted from its last token.
    """
    boxes = first_fit([len(example.tokens) - 1 for example in examples], capacity)
    return [tuple(examples[index] for index in box) for box in boxes]


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put things into few boxes: the longest first, each into the first box with room for it.

    That is never more than 11/9 of the fewest boxes possible, plus one.

    Args:
        lengths: of the things, each at most `capacity`.
        capacity: of a box.

    Returns:
        The numbers of the things in each box.

    Raises:
        ValueError: a thing is longer than a box.

    Source: Johnson, "Near-optimal bin packing algorithms", 1973.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"a length of {max(lengths)} does not fit into {capacity}")
    boxes: list[list[int]] = []
    room: list[int] = []
    for thing in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[thing]
        box = next((i for i, left in enumerate(room) if left >= length), len(boxes))
        if box == len(boxes):
            boxes.append([])
            room.append(capacity)
        boxes[box].append(thing)
        room[box] -= length
    return boxes
