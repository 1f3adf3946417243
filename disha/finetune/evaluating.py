"""Measures a model on rows of data: ``disha evaluate``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

import disha
from disha.finetune.adapting import with_adapter, without_adapter
from disha.finetune.base_model import BaseModel, open_base_model
from disha.finetune.data.batches import batch_by_length
from disha.finetune.data.dataset import read_rows
from disha.finetune.data.encoding import Encoder, Tally, encode_rows
from disha.finetune.data.examples import Example, StoredExamples
from disha.finetune.data.rows import Row, Rows
from disha.finetune.errors import SettingsError
from disha.finetune.generation import complete
from disha.finetune.inputs import encoder_for, require_context
from disha.finetune.scales import AtScale, at_scales
from disha.finetune.settings import EvaluateSettings, RowSettings
from disha.finetune.text.tokenizer import Tokenizer
from disha.finetune.training.evaluation import Evaluation, mean_loss
from disha.finetune.training.objectives import objective_for

__all__ = [
    "Measured",
    "Measurement",
    "Question",
    "Watch",
    "evaluate",
    "exact_answers",
    "first_questions",
    "perplexity_of",
]


@dataclass(frozen=True)
class Measured:
    """Measurements of one model.

    Args:
        loss: cross-entropy per learned token, in nats.
        tokens: how many learned tokens there are.
        exact: how many answers equal the response; None if not requested.
    """

    loss: float
    tokens: int
    exact: int | None

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return perplexity_of(self.loss)


def perplexity_of(loss: float) -> float:
    """Return the exponential of a loss."""
    return math.exp(loss) if loss < 700 else math.inf


@dataclass(frozen=True)
class Measurement:
    """The result of `evaluate`.

    Args:
        model: measurements of the model, with the adapter if there is one.
        base: measurements of the base model alone; None if not requested.
        tally: how many rows were used, cut or left out.
        scales: the losses at each scale of the adapter that was asked for.
    """

    model: Measured
    base: Measured | None
    tally: Tally
    scales: tuple[AtScale, ...] = ()


Watch: TypeAlias = Callable[[Iterable[Any], int, str], Iterable[Any]]
"""A function that yields items and shows progress. It takes the items, their number and a label."""


def evaluate(
    settings: EvaluateSettings, watch: Watch = lambda items, total, label: items
) -> Measurement:
    """Measure the model that the settings name, on the rows that they name.

    Args:
        settings: the model, the adapter and the rows.
        watch: shows progress; by default nothing is shown.

    Raises:
        DishaError: a file can't be used, or the model, adapter and rows do not fit together.
    """
    settings.check()
    rows = read_rows(settings.data)
    base = open_base_model(settings.model)
    encoder = _encoder(settings, base)
    examples, tally = _encoded(rows, encoder, settings.data)
    retained = None
    if settings.retain is not None:
        data = replace(settings.data, data_path=(settings.retain,), dataset_split=("train",))
        retained, _ = _encoded(read_rows(data), encoder, data)
    questions = first_questions(rows, encoder, len(rows)) if settings.exact_match else []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, values = with_adapter(base.load(device), settings.adapter, merge=settings.merge)
    # An adapter that can't be scaled is refused here, before the longer work.
    scales = tuple(_at_scales(model, settings, examples, retained, watch))
    measured = _measured(model, settings, encoder, examples, questions, watch)
    if not settings.compare:
        return Measurement(measured, None, tally, scales)
    if settings.merge:
        disha.unmerge_adapters(model)
    with without_adapter(model, values):
        alone = _measured(model, settings, encoder, examples, questions, watch)
    return Measurement(measured, alone, tally, scales)


def _encoder(settings: EvaluateSettings, base: BaseModel) -> Encoder:
    if base.tokenizer is None:
        raise SettingsError(
            f"--model {settings.model.model} came without a tokenizer; disha evaluate measures "
            "models of text"
        )
    require_context(settings.data, base)
    return encoder_for(settings.data, base.tokenizer, settings.adapter)


def _encoded(rows: Rows, encoder: Encoder, settings: RowSettings) -> tuple[StoredExamples, Tally]:
    workers, on_disk = settings.dataloader_num_workers, settings.streaming
    return encode_rows(rows, encoder, workers=workers, on_disk=on_disk)


def _measured(
    model: nn.Module,
    settings: EvaluateSettings,
    encoder: Encoder,
    examples: Sequence[Example],
    questions: Sequence[Question],
    watch: Watch,
) -> Measured:
    found = _loss(model, settings, examples, watch)
    exact = None
    if settings.exact_match:
        exact = exact_answers(
            model,
            encoder.tokenizer,
            questions,
            max_new_tokens=settings.max_new_tokens,
            size=settings.per_device_eval_batch_size,
            watch=watch,
        )
    return Measured(found.loss, found.terms, exact)


def _loss(
    model: nn.Module, settings: EvaluateSettings, examples: Sequence[Example], watch: Watch
) -> Evaluation:
    objective = objective_for(model, has_tokenizer=True)
    size = settings.per_device_eval_batch_size
    batches = math.ceil(len(examples) / size)
    return mean_loss(objective, watch(batch_by_length(examples, size), batches, "measuring"))


def _at_scales(
    model: nn.Module,
    settings: EvaluateSettings,
    examples: Sequence[Example],
    retained: Sequence[Example] | None,
    watch: Watch,
) -> Iterator[AtScale]:
    """Measure the model at the scales of the settings, also on the rows to retain."""
    if not settings.at_scales:
        return

    def loss(rows: Sequence[Example]) -> float:
        return _loss(model, settings, rows, watch).loss

    of_retained = None if retained is None else partial(loss, retained)
    yield from at_scales(model, settings.at_scales, partial(loss, examples), of_retained)


# --- exact answers -------------------------------------------------------------------------------


class Question(NamedTuple):
    """A prompt as token ids, and the response to it."""

    prompt: tuple[int, ...]
    response: str


def first_questions(rows: Iterable[Row], encoder: Encoder, most: int) -> list[Question]:
    """Return the questions of the first usable rows.

    Args:
        rows: rows with a query and a response.
        encoder: turns them into token ids.
        most: how many to return at most.
    """
    encoded = ((row, encoder.encode(row)) for row in rows)
    found = (
        Question(one.prompt, row.text(encoder.fields_of(row)[1]))
        for row, one in encoded
        if one is not None
    )
    return list(itertools.islice(found, most))


def exact_answers(
    model: nn.Module,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    size: int,
    watch: Watch = lambda items, total, label: items,
) -> int:
    """Count the answers that equal the response, apart from surrounding white space.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        questions: what to ask.
        max_new_tokens: most tokens of an answer.
        size: how many are asked together.
        watch: shows progress.
    """
    # Sort by length, as prompts of the same length are answered together.
    ordered = sorted(questions, key=lambda question: len(question.prompt))
    groups = [ordered[first : first + size] for first in range(0, len(ordered), size)]
    exact = 0
    for group in watch(groups, len(groups), "answering"):
        prompts = [question.prompt for question in group]
        made = complete(model, prompts, max_new_tokens=max_new_tokens, ends=tokenizer.ends)
        for question, ids in zip(group, made, strict=True):
            exact += tokenizer.decode(ids).strip() == question.response.strip()
    return exact
