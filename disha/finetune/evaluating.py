"""Measuring a model on rows: loss, perplexity, and answers that are exactly right."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import nn

import disha
from disha.finetune.adapting import without_adapter
from disha.finetune.answering import TEMPLATE_KEY, with_adapter
from disha.finetune.base_model import BaseModel, open_base_model
from disha.finetune.data.batches import batch_by_length
from disha.finetune.data.dataset import open_rows
from disha.finetune.data.encoding import Encoder, Tally
from disha.finetune.data.examples import Example
from disha.finetune.data.rows import Row
from disha.finetune.errors import SettingsError
from disha.finetune.generation import complete
from disha.finetune.inputs import encoder_for, require_context
from disha.finetune.settings import EvaluateSettings
from disha.finetune.text.tokenizer import Tokenizer
from disha.finetune.training.evaluation import mean_loss
from disha.finetune.training.objectives import objective_for

__all__ = ["Measured", "Measurement", "Watch", "evaluate"]

T = TypeVar("T")


@dataclass(frozen=True)
class Measured:
    """What a model is measured to do.

    Args:
        loss: cross-entropy per learned token, in nats.
        tokens: how many those are.
        exact: how many answers are exactly the response; None where not asked for.
    """

    loss: float
    tokens: int
    exact: int | None

    @property
    def perplexity(self) -> float:
        """E to the loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(frozen=True)
class Measurement:
    """What was measured.

    Args:
        model: with the adapter, if there is one.
        base: of the base model alone; None where not asked for.
        tally: what became of the rows.
    """

    model: Measured
    base: Measured | None
    tally: Tally


class Watch(Protocol):
    """Shows how far something is, while it is gone through."""

    def __call__(self, items: Iterable[T], total: int, what: str) -> Iterator[T]:
        """Yield the items; there are `total`, and `what` is being done."""


def _unwatched(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    yield from items


def evaluate(settings: EvaluateSettings, watch: Watch = _unwatched) -> Measurement:
    """Measure the model that settings name, on the rows that they name.

    Args:
        settings: what to measure, and on what.
        watch: shows progress; nothing is shown if not given.

    Raises:
        DishaError: a file can't be used, or things don't go together.
    """
    settings.check()
    data = settings.data
    rows = open_rows(data.data, data.dataset_split, streaming=data.streaming)
    base = open_base_model(settings.model)
    encoder = _encoder(settings, base)
    tally, used, examples = Tally(), [], []
    for row in rows:
        outcome = encoder.outcome(row)
        encoder.require_allowed(outcome)
        tally.add(outcome)
        if outcome.example is not None:
            used.append(row)
            examples.append(outcome.example)
    tally.require_used(data.max_seq_length)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, values = with_adapter(base.load(device), settings.adapter, merge=settings.merge)
    measured = _measured(model, settings, encoder, used, examples, watch)
    if not settings.compare:
        return Measurement(measured, None, tally)
    if settings.merge:
        disha.unmerge_adapters(model)
    with without_adapter(model, values):
        alone = _measured(model, settings, encoder, used, examples, watch)
    return Measurement(measured, alone, tally)


def _encoder(settings: EvaluateSettings, base: BaseModel) -> Encoder:
    if base.tokenizer is None:
        raise SettingsError(
            f"--model {settings.model.model} came without a tokenizer; disha evaluate measures "
            "models of text"
        )
    require_context(settings.data, base)
    noted = None
    if settings.adapter is not None and settings.data.template == "auto":
        noted = disha.inspect_adapter(settings.adapter).metadata.get(TEMPLATE_KEY)
    return encoder_for(settings.data, base.tokenizer, noted)


def _measured(
    model: nn.Module,
    settings: EvaluateSettings,
    encoder: Encoder,
    rows: Sequence[Row],
    examples: Sequence[Example],
    watch: Watch,
) -> Measured:
    objective = objective_for(model, has_tokenizer=True)
    size = settings.per_device_eval_batch_size
    batches = math.ceil(len(examples) / size)
    found = mean_loss(objective, watch(batch_by_length(examples, size), batches, "measuring"))
    exact = None
    if settings.exact_match:
        answers = _answers(model, settings, encoder.tokenizer, examples, watch)
        field = settings.data.dataset_field[1]
        pairs = zip(answers, rows, strict=True)
        exact = sum(answer.strip() == row.text(field).strip() for answer, row in pairs)
    return Measured(found.loss, found.terms, exact)


def _answers(
    model: nn.Module,
    settings: EvaluateSettings,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    watch: Watch,
) -> list[str]:
    """The answer to each example's prompt; prompts of one length are answered together."""
    answers = [""] * len(examples)
    places = sorted(range(len(examples)), key=lambda place: len(examples[place].prompt))
    size = settings.per_device_eval_batch_size
    groups = [places[first : first + size] for first in range(0, len(places), size)]
    for group in watch(groups, len(groups), "answering"):
        prompts = [examples[place].prompt for place in group]
        made = complete(model, prompts, max_new_tokens=settings.max_new_tokens, ends=tokenizer.ends)
        for place, ids in zip(group, made, strict=True):
            answers[place] = tokenizer.decode(ids)
    return answers
