"""The batches of every epoch, in an order set by the seed.

Examples come from memory, or from rows on disk. Rows on disk are read and encoded when they are
needed, here or in worker processes. The number of workers changes no batch. To resume in the middle
of an epoch, the earlier rows are encoded again to find out which batches they made.
"""

from __future__ import annotations

import hashlib
import math
import signal
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import TypeVar

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

from disha import DishaError
from disha.finetune.data.batches import TextRow, TokenBatch, collate, packed
from disha.finetune.data.encoding import Encoder, Outcome, Tally
from disha.finetune.data.examples import Example, StoredExamples
from disha.finetune.data.mixing import drawn, mixed_order
from disha.finetune.data.order import permutation, reading_order
from disha.finetune.data.parquet import ParquetRows
from disha.finetune.data.rows import Rows
from disha.finetune.data.stamp import opened
from disha.finetune.data.text_files import TextRows
from disha.finetune.errors import TrainingError
from disha.finetune.hashing import file_hash
from disha.finetune.stopping import SIGNALS

__all__ = ["StreamedExamples", "TextBatches"]

T = TypeVar("T")

SORTED_BATCHES = 50
"""How many batches are sorted by length together while shuffling."""

PACKED_TOGETHER = 1024
"""How many examples are packed together; more leave fewer gaps and take more time."""

ENCODED_TOGETHER = 64
"""How many rows a worker encodes before it hands them over."""


@dataclass(frozen=True)
class TextBatches:
    """Batches of examples, shuffled again in every epoch.

    Without packing, examples may be sorted by length within windows of some batches, so that
    examples of similar length share a batch with little padding. Then the batches of a window are
    shuffled.
    With packing, examples that are close together in the shuffled order share rows. So the contents
    of rows change from epoch to epoch, and the number of rows changes a little.

    Args:
        examples: in memory or streamed.
        size: rows per batch; the last batch may be smaller.
        seed: decides the order.
        row_length: pack examples into rows of at most this many tokens; an example may have one
            token more. None gives each example a row of its own.
        by_length: sort by length, where rows are not packed.
    """

    examples: StoredExamples | StreamedExamples
    size: int
    seed: int
    row_length: int | None = None
    by_length: bool = True

    def batches(self, epoch: int) -> Iterator[Sequence[TextRow]]:
        """Yield the batches of an epoch, counted from 1.

        Raises:
            DataError: a streamed row can't be read or used, or no row can.
        """
        seed = self.seed + epoch
        examples = self.examples.shuffled(seed)
        if self.row_length is None:
            together = SORTED_BATCHES if self.by_length else 1
            return _batches_by_length(examples, self.size, together, seed)
        return _packed_batches(examples, self.row_length, self.size, seed)

    def batches_per_epoch(self) -> int | None:
        """How many batches an epoch has; None if every row must be encoded to know.

        With packing, later epochs may have a few batches more or less than this. With streaming,
        an epoch has fewer if a row can't be used.
        """
        if self.row_length is None:
            return math.ceil(sum(self.examples.drawn) / self.size)
        return None if isinstance(self.examples, StreamedExamples) else self._batches_at_first

    def digest(self) -> str:
        """Return a hash of all rows.

        Raises:
            DataError: a file of streamed rows can't be read.
        """
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


# --- streaming -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class StreamedExamples:
    """Rows on disk, which are read and encoded when they are needed.

    They come in the same order as examples in memory, if every row can be used and can be read
    alone (see `reading_order`). Only the rows of a few batches are in memory at a time.

    Args:
        rows: the rows to read.
        encoder: turns a row into an example.
        workers: how many processes encode rows ahead; with 0, this process encodes them.
        weights: the weights of the data sets that the rows are from, if they have weights.
        tally: how many rows were used, cut or left out in the latest epoch.
    """

    rows: Rows
    encoder: Encoder
    workers: int = 0
    weights: Sequence[float] = ()
    tally: Tally = field(default_factory=Tally)

    @property
    def drawn(self) -> list[int]:
        """How many examples an epoch draws, if every row can be used, as in `StoredExamples`."""
        return drawn(self.rows.sizes, self.weights) if self.weights else [len(self.rows)]

    def digest(self) -> str:
        """Return a hash of the files, the row numbers, and the settings that encode the rows.

        The rows themselves would have to be encoded first.

        Raises:
            DataError: a file can't be read.
        """
        tokenizer, numbers = self.encoder.tokenizer, self.rows.numbers
        digest = hashlib.sha256()
        for file in self.rows.files:
            assert isinstance(file, (ParquetRows, TextRows))  # which can be streamed
            with opened(file.path):
                digest.update(file_hash(file.path).encode())
        digest.update(repr(numbers).encode() if isinstance(numbers, range) else array("q", numbers))
        vocabulary = sorted(tokenizer.backend.get_vocab().items())
        fields = self.rows.names or self.encoder.fields
        sizes = self.rows.sizes if self.weights else ()
        digest.update(repr((fields, tokenizer.chat_template, vocabulary, sizes)).encode())
        return digest.hexdigest()

    def shuffled(self, seed: int) -> Iterator[Example]:
        """Yield the examples that an epoch draws, in an order that `seed` decides.

        Raises:
            DataError: a row can't be read or used, or no row can.
        """
        self.tally.clear()
        for outcome in _outcomes(self.rows, self.encoder, self._order(seed), self.workers):
            example = self.encoder.counted(outcome, self.tally)
            if example is not None:
                yield example
        self.tally.require_used(self.encoder.max_length)

    def _order(self, seed: int) -> array[int]:
        if not self.weights:
            return reading_order(self.rows, seed)
        parts = self.rows.parts()
        return mixed_order(
            self.rows.sizes,
            self.weights,
            seed,
            lambda place, seed: reading_order(parts[place], seed),
        )


def _outcomes(
    rows: Rows, encoder: Encoder, order: Sequence[int], workers: int
) -> Iterator[Outcome]:
    loader = DataLoader(
        _EncodedRows(rows, encoder),
        batch_size=None,
        sampler=BatchSampler(order, ENCODED_TOGETHER, drop_last=False),
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=_leave_stopping_to_training,
        # Without its own generator, the loader would draw from training's random state.
        generator=torch.Generator(),
    )
    try:
        for piece in loader:
            if isinstance(piece, DishaError):
                raise piece
            yield from piece
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise TrainingError(
            f"a worker process that prepares rows has ended ({error}), maybe for lack of memory; "
            "lower --dataloader_num_workers"
        ) from error


@dataclass(frozen=True)
class _EncodedRows(Dataset[Sequence[Outcome] | DishaError]):
    """The outcomes of rows, by the numbers of the rows.

    An error is returned, not raised, because an exception from another process loses its message on
    the way here.
    """

    rows: Rows
    encoder: Encoder

    def __getitem__(self, indices: Sequence[int]) -> Sequence[Outcome] | DishaError:
        try:
            return [self.encoder.outcome(self.rows[index]) for index in indices]
        except DishaError as error:
            return error


def _leave_stopping_to_training(worker: int) -> None:
    """Ignore signals such as Ctrl-C, which every process gets, and end at SIGTERM as usual.

    Workers start while training handles these signals, and would inherit its handler.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _unchanged(piece: T) -> T:
    return piece
