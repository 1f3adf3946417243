"""Turns rows into examples.

The fields of a row decide which tokens count in the loss:

- two fields: the response and an end token; the query stands before them in a template
- one field of text: the whole text
- one field of chat messages: the assistant's messages
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from disha import DishaError
from disha.finetune.data.examples import Example, StoredExamples
from disha.finetune.data.rows import Row, Rows, checked_text, pieces
from disha.finetune.errors import BadRowError, DataError, TokenizerError, TrainingError
from disha.finetune.stopping import SIGNALS
from disha.finetune.text.chat import encode_chat
from disha.finetune.text.templates import Template
from disha.finetune.text.tokenizer import Tokenizer
from disha.text import brief

__all__ = ["Encoder", "Outcome", "Tally", "encode_rows"]

T = TypeVar("T")

MOST_COMPLAINTS = 5
"""How many complaints about bad rows a tally keeps."""


@dataclass(frozen=True)
class Outcome:
    """The result of encoding a row.

    Args:
        example: the row as token ids; None if it can't be used.
        is_cut: whether a part of it was cut off to fit.
        complaint: what is wrong with it; None if it is good, or only too long.
    """

    example: Example | None = None
    is_cut: bool = False
    complaint: str | None = None


@dataclass
class Tally:
    """How many rows were used, cut, or left out.

    Args:
        used: rows that became examples, cut rows included.
        cut: rows of which a part was cut off to fit.
        dropped: rows left out because they don't fit.
        bad: rows left out because something is wrong with them.
        complaints: what is wrong with the first few bad rows.
    """

    used: int = 0
    cut: int = 0
    dropped: int = 0
    bad: int = 0
    complaints: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """How many rows there were."""
        return self.used + self.dropped + self.bad

    @property
    def remarks(self) -> str:
        """A remark about rows that were cut or left out; empty if there are none."""
        remarks = [
            f"; {count:,} {what}"
            for count, what in (
                (self.cut, "of them cut to fit"),
                (self.dropped, "left out as too long"),
                (self.bad, "left out as unusable"),
            )
            if count
        ]
        if self.complaints:
            remarks.append(f", such as: {self.complaints[0]}")
        return "".join(remarks)

    def add(self, outcome: Outcome) -> None:
        """Count a row."""
        if outcome.complaint is not None:
            self.bad += 1
            if len(self.complaints) < MOST_COMPLAINTS:
                self.complaints.append(outcome.complaint)
        elif outcome.example is None:
            self.dropped += 1
        else:
            self.used += 1
            self.cut += outcome.is_cut

    def require_used(self, max_length: int) -> None:
        """Check that some rows could be used, if there were any.

        Raises:
            DataError: there were rows, but none could be used.
        """
        if self.used or not self.rows:
            return
        reasons = []
        if self.dropped:
            reasons.append(
                f"{self.dropped} don't fit into --max_seq_length {max_length} with their complete "
                "response or chat (raise it)"
            )
        if self.bad:
            reasons.append(f"something is wrong with {self.bad}, such as: {self.complaints[0]}")
        raise DataError(f"none of the {self.rows} rows can be used: {'; '.join(reasons)}")


@dataclass(frozen=True)
class Encoder:
    """Turns a row into token ids. It keeps no count, so copies of it can work in parallel.

    If a row is too long, the end of its query is cut off. A response is never cut: if it leaves no
    room for a query, the row is left out. A text that is too long loses its end. A chat that is too
    long is left out.

    Args:
        tokenizer: the tokenizer of the model.
        fields: the names of the query and response fields, or of one text or chat field.
        max_length: most tokens per row.
        template: the text around a query; needed for two fields.
        skip_bad_rows: whether to leave bad rows out instead of raising an error.
    """

    tokenizer: Tokenizer
    fields: tuple[str, ...]
    max_length: int
    template: Template | None = None
    skip_bad_rows: bool = False

    def fields_of(self, row: Row) -> tuple[str, ...]:
        """Return the names of a row's fields to learn."""
        return row.names or self.fields

    def encode(self, row: Row) -> Example | None:
        """Return a row as token ids, or None if it does not fit or is bad and may be skipped.

        Raises:
            BadRowError: something is wrong with the row, and `skip_bad_rows` is False.
        """
        return self.counted(self.outcome(row), Tally())

    def outcome(self, row: Row) -> Outcome:
        """Encode a row. If something is wrong with it, return a complaint instead of raising."""
        try:
            names = self.fields_of(row)
            if len(names) == 2:
                return self._pair(row, *names)
            if isinstance(row[names[0]], str):
                return self._text(row, *names)
            return self._chat(row, *names)
        except BadRowError as error:
            return Outcome(complaint=str(error))

    def counted(self, outcome: Outcome, tally: Tally) -> Example | None:
        """Count a row in a tally, and return it as token ids, or None if it can't be used.

        Raises:
            BadRowError: the row is bad, and `skip_bad_rows` is False.
        """
        if outcome.complaint is not None and not self.skip_bad_rows:
            raise BadRowError(outcome.complaint)
        tally.add(outcome)
        return outcome.example

    def _pair(self, row: Row, query_name: str, response_name: str) -> Outcome:
        if self.template is None:
            raise DataError("two fields need a template to put the query in")
        query, response = row.text(query_name), row.text(response_name)
        _require_content(response, row, response_name)
        answer = self.tokenizer.encode(response, special=False, continues=True)
        answer.append(self.tokenizer.end)
        before, asked, after = self.template.parts(query, self.tokenizer)
        room = self.max_length - len(before) - len(after) - len(answer)
        if room < min(1, len(asked)):
            return Outcome()
        prompt = [*before, *asked[:room], *after]
        tokens = (*prompt, *answer)
        learned = (max(1, len(prompt)), len(tokens))
        return Outcome(Example(tokens, (learned,)), is_cut=len(asked) > room)

    def _text(self, row: Row, name: str) -> Outcome:
        tokenizer, text = self.tokenizer, row.text(name)
        _require_content(text, row, name)
        all_tokens = (*tokenizer.begin, *tokenizer.encode(text, special=False), tokenizer.end)
        if len(all_tokens) < 2:
            raise BadRowError(
                f"{row.place}: field {name!r} has no tokens, so there is nothing to learn"
            )
        tokens = all_tokens[: self.max_length]
        is_cut = len(tokens) < len(all_tokens)
        return Outcome(Example(tokens, ((1, len(tokens)),)), is_cut)

    def _chat(self, row: Row, name: str) -> Outcome:
        messages, what = row[name], f"{row.place}: field {name!r}"
        if not isinstance(messages, list):
            raise BadRowError(
                f"{what} must be text or a list of chat messages, found {type(messages).__name__} "
                f"{brief(messages):.60}"
            )
        for number, message in enumerate(messages, 1):
            content = message.get("content") if isinstance(message, dict) else None
            if isinstance(content, str):
                checked_text(content, f"{what}: message {number}")
        try:
            ids, learned = encode_chat(messages, self.tokenizer)
        except DataError as error:
            raise BadRowError(f"{row.place}: {error}") from error
        except TokenizerError as error:  # no row can be used
            raise TokenizerError(f"{row.place}: {error}") from error
        if len(ids) > self.max_length:
            return Outcome()
        return Outcome(Example(tuple(ids), tuple(learned)))


def encode_rows(
    rows: Rows,
    encoder: Encoder,
    weights: Sequence[float] = (),
    *,
    workers: int = 0,
    on_disk: bool = False,
) -> tuple[StoredExamples, Tally]:
    """Turn rows into token ids.

    Args:
        rows: any number of rows, or none.
        encoder: turns each row into token ids.
        weights: the weights of the data sets that the rows are from, if they have weights.
        workers: how many processes encode rows; with 0, this process encodes them.
        on_disk: keep the tokens in a temporary file.

    Returns:
        The usable rows, in order, and a tally of all rows.

    Raises:
        BadRowError: something is wrong with a row, and `encoder.skip_bad_rows` is False.
        DataError: there are rows, but none can be used.
        TrainingError: a process that encodes rows has ended.
        OutputError: the temporary file can't be written.
    """
    examples, tally = StoredExamples(weights=weights, on_disk=on_disk), Tally()
    for part in rows.parts():
        for outcome in _outcomes(part, encoder, workers):
            example = encoder.counted(outcome, tally)
            if example is not None:
                examples.append(example)
        examples.end_part()
    tally.require_used(encoder.max_length)
    return examples, tally


def _require_content(text: str, row: Row, name: str) -> None:
    if not text.strip():
        raise BadRowError(f"{row.place}: field {name!r} is empty, so there is nothing to learn")


# --- processes that encode rows ------------------------------------------------------------------

ENCODED_TOGETHER = 64
"""How many rows a process encodes before it hands them over."""


def _outcomes(rows: Rows, encoder: Encoder, workers: int) -> Iterator[Outcome]:
    loader = DataLoader(
        _EncodedRows(rows, encoder),
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=_leave_stopping_to_training,
        # Without its own generator, the loader would change the random state of training.
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
class _EncodedRows(IterableDataset[Sequence[Outcome] | DishaError]):
    """The outcomes of rows, in pieces of several rows. Each of n processes encodes every nth piece.

    An error is not raised, but is the last item. An exception that another process raises loses its
    message on the way here.
    """

    rows: Rows
    encoder: Encoder

    def __iter__(self) -> Iterator[Sequence[Outcome] | DishaError]:
        worker = get_worker_info()
        count, own = (1, 0) if worker is None else (worker.num_workers, worker.id)
        try:
            for number, piece in enumerate(pieces(self.rows, ENCODED_TOGETHER)):
                if number % count == own:
                    yield [self.encoder.outcome(row) for row in piece]
        except DishaError as error:
            yield error


def _leave_stopping_to_training(worker: int) -> None:
    """Ignore signals such as Ctrl-C, which every process gets, but end at SIGTERM as usual.

    A worker starts while training handles these signals, so it inherits the handler of training.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _unchanged(piece: T) -> T:
    return piece
