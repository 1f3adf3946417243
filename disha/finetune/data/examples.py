"""Rows of text to batches of token ids.

A row is a query and a response. The model sees a template around the query, then the response and
an end token; only the response and that end token count in the loss.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from disha.finetune.errors import DataError
from disha.finetune.models.decoder import IGNORED
from disha.finetune.text.tokenizer import Tokenizer

__all__ = [
    "Batch",
    "Dataset",
    "Encoded",
    "Example",
    "Pair",
    "Template",
    "batch_by_length",
    "collate",
    "encode_pairs",
    "encode_prompt",
    "read_pairs",
    "shuffled_batches",
    "split_held_out",
    "template_for",
]


@dataclass(frozen=True)
class Pair:
    """A text to answer and the answer to learn."""

    query: str
    response: str


@dataclass(frozen=True)
class Dataset:
    """The rows to train on, and those held out to measure on (maybe none)."""

    training: tuple[Pair, ...]
    held_out: tuple[Pair, ...]


@dataclass(frozen=True)
class Template:
    """What surrounds a query: `before` + query + `after`, then the response."""

    before: str
    after: str


CHAT = Template("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
PLAIN = Template("### Instruction:\n", "\n\n### Response:\n")

SORTED_BATCHES = 16
"""How many batches are sorted by length together while shuffling."""


@dataclass(frozen=True)
class Example:
    """One row as token ids.

    Args:
        tokens: prompt, response and end token.
        prompt_length: how many of the tokens are the prompt.
    """

    tokens: tuple[int, ...]
    prompt_length: int

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens before the response."""
        return self.tokens[: self.prompt_length]

    @property
    def supervised(self) -> int:
        """Tokens that count in the loss: the response and the end token."""
        return len(self.tokens) - self.prompt_length


@dataclass(frozen=True)
class Encoded:
    """Rows as token ids.

    Args:
        examples: the rows that can be used, in their order.
        cut: how many of them had the end of their query cut off to fit.
        dropped: how many rows were left out, as even without a query they don't fit.
    """

    examples: tuple[Example, ...]
    cut: int
    dropped: int


@dataclass(frozen=True)
class Batch:
    """Examples side by side, padded on the right.

    Args:
        tokens: (batch, time) token ids; padding is 0.
        labels: (batch, time) the token that should follow each one, or `IGNORED`.
        real_tokens: how many of `tokens` are not padding.
        supervised: how many of `labels` count in the loss.
    """

    tokens: Tensor
    labels: Tensor
    real_tokens: int
    supervised: int


def read_pairs(path: Path, fields: tuple[str, str]) -> list[Pair]:
    """Read a JSON-lines file: one object per line, blank lines ignored.

    Args:
        path: the file, UTF-8.
        fields: names of the query's and the response's field.

    Raises:
        DataError: the file is missing, unreadable or holds no row, or a row is not as it must be;
            the message names file and line.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:  # with or without a byte-order mark
            pairs = [
                _pair(line, fields, f"{path}, line {number}")
                for number, line in enumerate(file, start=1)
                if line.strip()
            ]
    except FileNotFoundError as error:
        raise DataError(f"there is no data file {path}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}); JSON lines must be") from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}") from error
    if not pairs:
        raise DataError(f"{path} holds no rows; it must hold one JSON object per line")
    return pairs


def _pair(line: str, fields: tuple[str, str], place: str) -> Pair:
    row = _row(line, place)
    query, response = (_text(row, field, place) for field in fields)
    if not response.strip():
        raise DataError(f"{place}: field {fields[1]!r} is empty, so there is nothing to learn")
    return Pair(query, response)


def _row(line: str, place: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{place} is not JSON ({error}); every line must hold one JSON object"
        ) from error
    if not isinstance(row, dict):
        raise DataError(
            f"{place} holds a JSON {type(row).__name__}; every line must hold one JSON object"
        )
    return row


def _text(row: dict[str, object], field: str, place: str) -> str:
    if field not in row:
        found = ", ".join(repr(name) for name in row) or "none"
        raise DataError(
            f"{place} has no field {field!r}; its fields are: {found} "
            "(--dataset_field names the two to use)"
        )
    value = row[field]
    if not isinstance(value, str):
        raise DataError(
            f"{place}: field {field!r} must be text, found {type(value).__name__} {value!r:.60}"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: field {field!r} holds half of a surrogate pair at character {error.start}, "
            "which is no text (an emoji that was cut in two, maybe)"
        ) from error
    return value


def split_held_out(pairs: Sequence[Pair], fraction: float, seed: int) -> Dataset:
    """Set a random part of the rows aside, both parts in their original order.

    Args:
        pairs: all rows.
        fraction: how much to hold out, from 0 up to but not including 1; rounded to whole rows,
            at least one unless 0.
        seed: decides which.

    Raises:
        DataError: nothing would be left to train on.
    """
    if fraction == 0:
        return Dataset(training=tuple(pairs), held_out=())
    count = max(1, round(len(pairs) * fraction))
    if count >= len(pairs):
        raise DataError(
            f"holding out {fraction:g} of {len(pairs)} rows leaves none to train on; "
            "give more rows or a smaller --eval_fraction"
        )
    chosen = set(_permutation(len(pairs), seed)[:count])
    return Dataset(
        training=tuple(pair for index, pair in enumerate(pairs) if index not in chosen),
        held_out=tuple(pair for index, pair in enumerate(pairs) if index in chosen),
    )


def template_for(tokenizer: Tokenizer) -> Template:
    """The chat template if the model knows its special tokens, else a plain one."""
    knows_chat = tokenizer.knows("<|im_start|>") and tokenizer.knows("<|im_end|>")
    return CHAT if knows_chat else PLAIN


def encode_pairs(pairs: Iterable[Pair], tokenizer: Tokenizer, max_length: int) -> Encoded:
    """Turn rows into token ids of at most `max_length` each.

    A response is never cut: a row too long loses the end of its query, and a row whose response
    leaves no room for a query is left out and counted.
    """
    examples: list[Example] = []
    cut = dropped = 0
    for pair in pairs:
        response = [*tokenizer.encode(pair.response, special=False), tokenizer.end]
        before, query, after = _prompt_parts(pair.query, tokenizer)
        room = max_length - len(before) - len(after) - len(response)
        if room < min(1, len(query)):
            dropped += 1
            continue
        cut += len(query) > room
        prompt = [*before, *query[:room], *after]
        examples.append(Example((*prompt, *response), len(prompt)))
    return Encoded(tuple(examples), cut, dropped)


def encode_prompt(query: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a query in the template, ready for a response."""
    before, tokens, after = _prompt_parts(query, tokenizer)
    return [*before, *tokens, *after]


def _prompt_parts(query: str, tokenizer: Tokenizer) -> tuple[list[int], list[int], list[int]]:
    template = template_for(tokenizer)
    begin = [] if tokenizer.begin is None else [tokenizer.begin]
    return (
        begin + tokenizer.encode(template.before),
        tokenizer.encode(query, special=False),
        tokenizer.encode(template.after),
    )


def collate(examples: Sequence[Example]) -> Batch:
    """Put examples side by side; labels are the tokens moved one place ahead."""
    time = max(len(example.tokens) for example in examples) - 1
    tokens = torch.zeros(len(examples), time, dtype=torch.int64)
    labels = torch.full((len(examples), time), IGNORED, dtype=torch.int64)
    for row, example in enumerate(examples):
        length = len(example.tokens) - 1
        ids = torch.tensor(example.tokens)
        tokens[row, :length] = ids[:-1]
        labels[row, example.prompt_length - 1 : length] = ids[example.prompt_length :]
    return Batch(
        tokens,
        labels,
        real_tokens=sum(len(example.tokens) - 1 for example in examples),
        supervised=sum(example.supervised for example in examples),
    )


def batch_by_length(examples: Sequence[Example], size: int) -> Iterator[Batch]:
    """Batches of `size`, longest first, so that little is padding and memory peaks at once."""
    ordered = sorted(examples, key=lambda example: len(example.tokens), reverse=True)
    for start in range(0, len(ordered), size):
        yield collate(ordered[start : start + size])


def shuffled_batches(
    examples: Sequence[Example], size: int, *, seed: int, epoch: int
) -> Iterator[Batch]:
    """Batches of `size` in an order that `seed` and `epoch` decide; the last may be smaller.

    Examples are shuffled, then sorted by length within windows of a few batches, so that examples
    of like length share a batch and little is padding; then the batches of a window are shuffled.
    """
    order = _permutation(len(examples), seed + epoch)
    for start in range(0, len(order), size * SORTED_BATCHES):
        window = sorted(
            order[start : start + size * SORTED_BATCHES],
            key=lambda index: len(examples[index].tokens),
        )
        batches = [window[first : first + size] for first in range(0, len(window), size)]
        for batch in _permutation(len(batches), seed + epoch + start):
            yield collate([examples[index] for index in batches[batch]])


def _permutation(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator).tolist()
