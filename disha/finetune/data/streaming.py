"""The batches of every epoch, in an order that the seed decides: of rows on disk.

Rows are read and encoded when their turn comes, here or in processes of their own; how many of
these there are changes nothing about the batches. What is held at a time depends on the size of
batches only. Going on in the middle of an epoch encodes the rows before again, as only that tells
which batches they made.
"""

from __future__ import annotations

import math
import signal
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from disha import DishaError
from disha.finetune.data.encoding import Encoder, Outcome, Tally
from disha.finetune.data.examples import Example
from disha.finetune.data.order import reading_order
from disha.finetune.data.rows import Row
from disha.finetune.data.sources import (
    OfExamples,
    OfPackedRows,
    PackedRow,
    batches_by_length,
    packed_batches,
)
from disha.finetune.errors import TrainingError

__all__ = ["StreamedExamples", "StreamedPackedExamples"]

T = TypeVar("T")

ENCODED_TOGETHER = 64
"""How many rows a process encodes before it hands them over."""


@dataclass(frozen=True)
class StreamedRows:
    """Rows shuffled anew in every epoch, and encoded when their turn comes.

    Args:
        rows: all of them.
        encoder: turns a row into an example.
        size: examples, or packed rows, per batch; the last may be smaller.
        seed: decides the order.
        workers: how many processes encode rows ahead; 0: this one encodes them.
        tally: what rows came to, in the epoch that was begun last.
    """

    rows: Sequence[Row]
    encoder: Encoder
    size: int
    seed: int
    workers: int = 0
    tally: Tally = field(default_factory=Tally)

    def examples(self, epoch: int) -> Iterator[Example]:
        """Yield the examples of an epoch, counted from 1, in its order.

        Raises:
            DataError: a row can't be read or used, or none can.
        """
        self.tally.clear()
        for outcome in _outcomes(self.rows, self.encoder, self.seed + epoch, self.workers):
            self.encoder.require_allowed(outcome)
            self.tally.add(outcome)
            if outcome.example is not None:
                yield outcome.example
        self.tally.require_used(self.encoder.max_length)


@dataclass(frozen=True)
class StreamedExamples(StreamedRows, OfExamples):
    """Batches of streamed rows.

    They are those of `ShuffledExamples`, as long as every row can be used and can be read alone
    (see `reading_order`).
    """

    def batches(self, epoch: int) -> Iterator[Sequence[Example]]:
        """Yield the batches of an epoch, counted from 1.

        Raises:
            DataError: a row can't be read or used, or none can.
        """
        return batches_by_length(self.examples(epoch), self.size, self.seed + epoch)

    def batches_per_epoch(self) -> int:
        """How many batches an epoch has if every row can be used; fewer otherwise."""
        return math.ceil(len(self.rows) / self.size)


@dataclass(frozen=True)
class StreamedPackedExamples(StreamedRows, OfPackedRows):
    """Batches of streamed rows, packed.

    They are those of `PackedExamples`, as long as every row can be used and can be read alone
    (see `reading_order`).
    """

    def batches(self, epoch: int) -> Iterator[Sequence[PackedRow]]:
        """Yield the batches of an epoch, counted from 1.

        Raises:
            DataError: a row can't be read or used, or none can.
        """
        length = self.encoder.max_length
        return packed_batches(self.examples(epoch), length, self.size, self.seed + epoch)

    def batches_per_epoch(self) -> None:
        """Not known: only encoding every row would tell."""


def _outcomes(rows: Sequence[Row], encoder: Encoder, seed: int, workers: int) -> Iterator[Outcome]:
    loader = DataLoader(
        _EncodedRows(rows, encoder),
        batch_size=None,
        sampler=_Pieces(reading_order(rows, seed)),
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=_leave_stopping_to_training,
        # Without one of its own, it would take a number from the random state of training.
        generator=torch.Generator(),
    )
    for piece in _arriving(loader):
        if isinstance(piece, DishaError):
            raise piece
        yield from piece


def _arriving(pieces: Iterable[T]) -> Iterator[T]:
    try:
        yield from pieces
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise TrainingError(
            f"a process that prepares rows has ended ({error}), maybe as memory did not suffice; "
            "lower --dataloader_num_workers"
        ) from error


@dataclass(frozen=True)
class _Pieces:
    """The numbers of rows, some at a time."""

    order: array[int]

    def __iter__(self) -> Iterator[array[int]]:
        for start in range(0, len(self.order), ENCODED_TOGETHER):
            yield self.order[start : start + ENCODED_TOGETHER]

    def __len__(self) -> int:
        return math.ceil(len(self.order) / ENCODED_TOGETHER)


@dataclass(frozen=True)
class _EncodedRows(Dataset[Sequence[Outcome] | DishaError]):
    """What becomes of rows, by their numbers.

    What can't be read is returned, not raised: on its way from another process, an exception that
    is raised loses its message.
    """

    rows: Sequence[Row]
    encoder: Encoder

    def __getitem__(self, indices: Sequence[int]) -> Sequence[Outcome] | DishaError:
        try:
            return [self.encoder.outcome(self.rows[index]) for index in indices]
        except DishaError as error:
            return error


def _leave_stopping_to_training(worker: int) -> None:
    """Let Ctrl-C, which every process hears, mean nothing here, and SIGTERM what it usually does.

    These processes are begun while training listens for both, and would listen in its place.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _unchanged(piece: T) -> T:
    return piece
