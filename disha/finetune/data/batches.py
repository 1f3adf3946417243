"""Puts examples into batches, padded or packed, in an order set by the seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from disha.finetune.data.examples import IGNORED, Example, StoredExamples
from disha.finetune.data.order import permutation
from disha.finetune.data.rows import pieces

__all__ = [
    "Batch",
    "BatchSource",
    "TextBatches",
    "TextRow",
    "TokenBatch",
    "batch_by_length",
    "collate",
    "first_fit",
    "packed",
]

T = TypeVar("T")

TextRow: TypeAlias = Sequence[Example]
"""The examples in one row of a batch: one, or several if they are packed."""


class Batch(Protocol):
    """What an objective takes."""

    @property
    def size(self) -> int:
        """The number of tokens without padding, or the number of samples."""

    @property
    def weight(self) -> int:
        """How many terms its summed loss has."""

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""


class BatchSource(Protocol[T]):
    """The batches of every epoch. Only the seed and the epoch decide what is in a batch."""

    def batches(self, epoch: int) -> Iterator[Sequence[T]]:
        """Yield the batches of an epoch before they are collated. Epochs count from 1."""

    def batches_per_epoch(self) -> int:
        """How many batches an epoch has."""

    def digest(self) -> str:
        """Return a hash of all rows."""

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
        positions: (batch, time) the place of each token in its own text, from 0; None if every row
            holds one text.
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
    """Put rows into one batch. The label of each token is the token after it.

    Args:
        rows: each holds one example or several.
        positions: whether to add the place of each token in its text; packed rows need it.
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
        places[number, start:] = torch.arange(time - start)  # padding counts as a separate text
    return TokenBatch(
        tokens,
        labels,
        places if positions else None,
        size=sum(len(example.tokens) - 1 for row in rows for example in row),
        weight=sum(example.supervised for row in rows for example in row),
    )


def batch_by_length(examples: Sequence[Example], size: int) -> Iterator[TokenBatch]:
    """Yield batches of `size`, the longest first. So padding is small and the memory peak early."""
    lengths = [len(example.tokens) for example in examples]
    ordered = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    for start in range(0, len(ordered), size):
        yield collate([[examples[index]] for index in ordered[start : start + size]])


def packed(examples: Sequence[Example], capacity: int) -> list[TextRow]:
    """Put examples into rows of at most `capacity` tokens to predict from.

    An example of n tokens takes n - 1 places, because no token is predicted from its last one.
    """
    boxes = first_fit([len(example.tokens) - 1 for example in examples], capacity)
    return [tuple(examples[index] for index in box) for box in boxes]


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put things into few boxes: the longest first, each into the first box with room for it.

    If m boxes are the fewest possible, this uses at most 11/9 m + 1.

    Args:
        lengths: the length of each thing, at most `capacity`.
        capacity: the total length that fits in a box.

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


# --- the batches of an epoch ----------------------------------------------------------------------

SORTED_BATCHES = 50
"""How many batches are sorted by length together while shuffling."""

PACKED_TOGETHER = 1024
"""How many examples are packed together; more leave fewer gaps and take more time."""


@dataclass(frozen=True)
class TextBatches:
    """Batches of examples, shuffled again in every epoch.

    Without packing, examples may be sorted by length within windows of some batches. So examples of
    similar length share a batch, which has little padding. Then the batches of a window are
    shuffled.

    With packing, examples that are close together in the shuffled order share rows. So the contents
    of rows change from epoch to epoch, and the number of rows changes a little.

    Args:
        examples: the examples of an epoch.
        size: rows per batch; the last batch may be smaller.
        seed: decides the order.
        row_length: pack examples into rows of at most this many tokens; an example may have one
            token more. None gives each example a row of its own.
        by_length: sort by length, if rows are not packed.
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
    for number, window in enumerate(pieces(examples, window_size)):
        window.sort(key=lambda example: len(example.tokens))
        parts = [window[i : i + size] for i in range(0, len(window), size)]
        for part in permutation(len(parts), seed + number * window_size):
            yield [(example,) for example in parts[part]]


def _packed_batches(
    examples: Iterable[Example], row_length: int, size: int, seed: int
) -> Iterator[Sequence[TextRow]]:
    waiting: list[TextRow] = []
    for number, window in enumerate(pieces(examples, PACKED_TOGETHER)):
        rows = packed(window, row_length)
        waiting.extend(rows[index] for index in permutation(len(rows), seed + number))
        while len(waiting) >= size:
            yield waiting[:size]
            del waiting[:size]
    if waiting:
        yield waiting
