"""The training loop: AdamW over whatever is trainable, exact gradient accumulation, cosine decay.

The loss of a step is the mean over the supervised tokens of *all* its batches, so that several
small batches give the gradient of one large batch, whatever their lengths.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor, nn

from disha.finetune.data.batches import Batch, BatchSource
from disha.finetune.errors import TrainingError
from disha.finetune.training.objectives import Objective

__all__ = ["Schedule", "Step", "TrainingPlan", "accumulate_gradients", "training_steps"]


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then half a cosine down to zero.

    Args:
        peak: the highest learning rate.
        steps: how many optimiser steps there are.
        warmup: how many of them warm up.
    """

    peak: float
    steps: int
    warmup: int

    def learning_rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ... `steps` - 1; none of them is zero."""
        if step < self.warmup:
            return self.peak * (step + 1) / (self.warmup + 1)
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class TrainingPlan:
    """What a training run does.

    Args:
        accumulation: batches per step.
        epochs: passes over the examples, unless `max_steps` is given.
        max_steps: optimiser steps, or 0 or less to go by `epochs`.
        learning_rate: the highest.
        weight_decay: AdamW's.
        warmup_ratio: part of the steps that warm up.
        max_gradient_norm: gradients are scaled down to this norm; 0 leaves them as they are.
        eval_steps: evaluate every so many steps, besides after the last; 0: not between.
    """

    accumulation: int
    epochs: float
    max_steps: int
    learning_rate: float
    weight_decay: float
    warmup_ratio: float
    max_gradient_norm: float
    eval_steps: int

    def steps(self, batches: int) -> int:
        """How many optimiser steps there are for so many batches an epoch."""
        if self.max_steps > 0:
            return self.max_steps
        return max(1, math.ceil(self.epochs * math.ceil(batches / self.accumulation)))

    def schedule(self, batches: int) -> Schedule:
        """The learning rates for so many batches an epoch."""
        steps = self.steps(batches)
        return Schedule(self.learning_rate, steps, math.ceil(steps * self.warmup_ratio))


@dataclass(frozen=True)
class Step:
    """What one optimiser step did.

    Args:
        step: its number, from 1.
        epoch: its pass over the examples, from 1.
        loss: mean over the step's supervised tokens before the update, in nats.
        learning_rate: the one used.
        gradient_norm: before scaling down.
        tokens: tokens that went through the model, padding left out.
        tokens_per_second: of this step.
        seconds: spent training up to here; evaluations left out.
        eval_loss: the held-out loss after this step, where it was measured.
    """

    step: int
    epoch: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    tokens_per_second: float
    seconds: float
    eval_loss: float | None


def training_steps(
    objective: Objective,
    source: BatchSource[Any],
    plan: TrainingPlan,
    evaluate: Callable[[], float] | None = None,
) -> Iterator[Step]:
    """Train, yielding after every optimiser step.

    Args:
        objective: what to minimise; the parameters that require gradients are trained.
        source: what to learn from.
        plan: how.
        evaluate: measures the held-out loss; called every `plan.eval_steps` steps and after the
            last.

    Raises:
        TrainingError: a loss or gradient is not finite; the weights stay as before that step.
    """
    trainable = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    schedule = plan.schedule(source.batches_per_epoch() or 0)
    optimizer = torch.optim.AdamW(trainable, lr=plan.learning_rate, weight_decay=plan.weight_decay)
    seconds = 0.0
    objective.train()
    for number, (epoch, batches) in enumerate(islice(_groups(source, plan), schedule.steps), 1):
        started = time.perf_counter()
        learning_rate = schedule.learning_rate(number - 1)
        loss = accumulate_gradients(objective, batches)
        norm = _clipped_norm(trainable, plan.max_gradient_norm)
        _require_finite(number, loss, norm)
        _update(optimizer, learning_rate)
        took = time.perf_counter() - started
        seconds += took
        tokens = sum(batch.size for batch in batches)
        is_due = number == schedule.steps or _divides(plan.eval_steps, number)
        yield Step(
            step=number,
            epoch=epoch,
            loss=loss,
            learning_rate=learning_rate,
            gradient_norm=norm,
            tokens=tokens,
            tokens_per_second=tokens / took,
            seconds=seconds,
            eval_loss=evaluate() if evaluate is not None and is_due else None,
        )


def _divides(divisor: int, number: int) -> bool:
    return divisor > 0 and number % divisor == 0


def accumulate_gradients(objective: Objective, batches: Sequence[Batch]) -> float:
    """Add to the gradients those of the mean loss over all supervised tokens of `batches`.

    Returns:
        That mean loss, in nats per token.
    """
    device = next(objective.parameters()).device
    supervised = sum(batch.weight for batch in batches)
    total = 0.0
    for batch in batches:
        loss = objective(batch.to(device)) / supervised
        loss.backward()
        total += float(loss.detach())
    return total


def _groups(source: BatchSource[Any], plan: TrainingPlan) -> Iterator[tuple[int, list[Batch]]]:
    """The batches of each step with its epoch, without end."""
    for epoch in count(1):
        batches = map(source.collate, source.batches(epoch))
        while group := list(islice(batches, plan.accumulation)):
            yield epoch, group


def _clipped_norm(parameters: Iterable[nn.Parameter], most: float) -> float:
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm: Tensor = nn.utils.get_total_norm(gradients)
    if most > 0:
        nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return float(norm)


def _require_finite(step: int, loss: float, norm: float) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    raise TrainingError(
        f"training stopped at step {step}: loss {loss}, gradient norm {norm}, which must both be "
        "finite; lower --learning_rate, or use --bits fp32, or look at the data"
    )


def _update(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
