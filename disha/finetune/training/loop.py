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

import torch
from torch import Tensor, nn

from disha.finetune.data.examples import Batch, Example, shuffled_batches
from disha.finetune.errors import TrainingError
from disha.finetune.models.decoder import Decoder

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
        batch_size: examples per batch.
        accumulation: batches per step.
        epochs: passes over the examples, unless `max_steps` is given.
        max_steps: optimiser steps, or 0 or less to go by `epochs`.
        learning_rate: the highest.
        weight_decay: AdamW's.
        warmup_ratio: part of the steps that warm up.
        max_gradient_norm: gradients are scaled down to this norm; 0 leaves them as they are.
        eval_steps: evaluate every so many steps, besides after the last; 0: not between.
        seed: decides the order of the examples.
    """

    batch_size: int
    accumulation: int
    epochs: float
    max_steps: int
    learning_rate: float
    weight_decay: float
    warmup_ratio: float
    max_gradient_norm: float
    eval_steps: int
    seed: int

    def steps(self, examples: int) -> int:
        """How many optimiser steps there are for so many examples."""
        if self.max_steps > 0:
            return self.max_steps
        batches = math.ceil(examples / self.batch_size)
        return max(1, math.ceil(self.epochs * math.ceil(batches / self.accumulation)))

    def schedule(self, examples: int) -> Schedule:
        """The learning rates for so many examples."""
        steps = self.steps(examples)
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
    model: Decoder,
    examples: Sequence[Example],
    plan: TrainingPlan,
    evaluate: Callable[[], float] | None = None,
) -> Iterator[Step]:
    """Train `model`, yielding after every optimiser step.

    Args:
        model: the language model; the parameters that require gradients are trained.
        examples: to learn from.
        plan: how.
        evaluate: measures the held-out loss; called every `plan.eval_steps` steps and after the
            last.

    Raises:
        TrainingError: a loss or gradient is not finite; the weights stay as before that step.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    schedule = plan.schedule(len(examples))
    optimizer = torch.optim.AdamW(trainable, lr=plan.learning_rate, weight_decay=plan.weight_decay)
    seconds = 0.0
    model.train()
    for number, (epoch, batches) in enumerate(islice(_groups(examples, plan), schedule.steps), 1):
        started = time.perf_counter()
        learning_rate = schedule.learning_rate(number - 1)
        loss = accumulate_gradients(model, batches)
        norm = _clipped_norm(trainable, plan.max_gradient_norm)
        _require_finite(number, loss, norm)
        _update(optimizer, learning_rate)
        took = time.perf_counter() - started
        seconds += took
        tokens = sum(batch.real_tokens for batch in batches)
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


def accumulate_gradients(model: Decoder, batches: Sequence[Batch]) -> float:
    """Add to the gradients those of the mean loss over all supervised tokens of `batches`.

    Returns:
        That mean loss, in nats per token.
    """
    device = model.lm_head.weight.device
    supervised = sum(batch.supervised for batch in batches)
    total = 0.0
    for batch in batches:
        loss = model.summed_loss(batch.tokens.to(device), batch.labels.to(device)) / supervised
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total


def _groups(examples: Sequence[Example], plan: TrainingPlan) -> Iterator[tuple[int, list[Batch]]]:
    """The batches of each step with its epoch, without end."""
    for epoch in count(1):
        batches = shuffled_batches(examples, plan.batch_size, seed=plan.seed, epoch=epoch)
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
