"""The training loop: AdamW over whatever is trainable, with exact gradient accumulation.

The loss of a step is the mean over the terms (tokens that are learned, say) of *all* its batches,
on all processes, so that several small batches give the gradient of one large batch, whatever their
lengths. Of the A * N batches of a step, with A to accumulate and N processes, process k takes every
Nth, from the kth on; so N processes that accumulate A batches do what one does that accumulates
A * N. At the end of an epoch there may be fewer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from disha.finetune.data.batches import BatchSource
from disha.finetune.errors import DataError, SettingsError, TrainingError
from disha.finetune.settings.training import ScheduleName
from disha.finetune.training.memory import explaining_lack_of_memory
from disha.finetune.training.parallel import Processes, deferred_reduction, whole
from disha.finetune.training.precision import computing_in_bf16, computing_in_tf32
from disha.finetune.training.schedule import Schedule

__all__ = [
    "Progress",
    "Share",
    "Step",
    "TrainingPlan",
    "accumulate_gradients",
    "make_optimizer",
    "training_steps",
]


@dataclass(frozen=True)
class TrainingPlan:
    """What a training run does.

    Args:
        accumulation: batches per step, on each process.
        epochs: passes over the examples, unless `max_steps` is given.
        max_steps: optimiser steps, or 0 or less to go by `epochs`.
        learning_rate: the highest.
        weight_decay: AdamW's.
        warmup_ratio: part of the steps that warm up.
        max_gradient_norm: gradients are scaled down to this norm; 0 leaves them as they are.
        eval_steps: evaluate every so many steps, besides after the last; 0: not between.
        schedule: how the learning rate goes on after the warm-up.
        bf16: compute in bfloat16 where that is safe.
        tf32: let CUDA compute float32 products in TF32.
    """

    accumulation: int
    epochs: float
    max_steps: int
    learning_rate: float
    weight_decay: float
    warmup_ratio: float
    max_gradient_norm: float
    eval_steps: int
    schedule: ScheduleName = "cosine"
    bf16: bool = False
    tf32: bool = False

    def steps(self, batches: int | None, processes: int = 1) -> int:
        """How many optimiser steps there are.

        Args:
            batches: how many an epoch has, for all processes; None where that is not known.
            processes: how many share them.

        Raises:
            SettingsError: it is not known, and `max_steps` does not say either.
        """
        if self.max_steps > 0:
            return self.max_steps
        if batches is None:
            raise SettingsError(
                "--max_steps is needed, as only reading all rows (--streaming) would tell how many "
                "steps an epoch has; give it, or leave --streaming out"
            )
        return max(1, math.ceil(self.epochs * math.ceil(batches / (self.accumulation * processes))))

    def learning_rates(self, batches: int | None, processes: int = 1) -> Schedule:
        """The learning rates of all steps, with the arguments of `steps`."""
        steps = self.steps(batches, processes)
        warmup = math.ceil(steps * self.warmup_ratio)
        return Schedule(self.schedule, self.learning_rate, steps, warmup)


@dataclass(frozen=True)
class Progress:
    """How far training is: what is done, and where in the data the next step begins.

    Args:
        step: optimiser steps done.
        epoch: the pass over the examples, from 1.
        batches: batches of this epoch that are done, on all processes.
        seconds: spent training; evaluations left out.
    """

    step: int = 0
    epoch: int = 1
    batches: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """What one optimiser step did, on all processes together.

    Args:
        step: its number, from 1.
        epoch: its pass over the examples, from 1.
        loss: mean over the step's terms before the update; of tokens, in nats.
        learning_rate: the one used.
        gradient_norm: before scaling down.
        tokens: tokens that went through the model, padding left out.
        tokens_per_second: of this step.
        seconds: spent training up to here; evaluations left out.
        eval_loss: the held-out loss after this step, where it was measured.
        batches: batches of this epoch that are done.
        ends_epoch: whether that is all of them.
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
    batches: int = 0
    ends_epoch: bool = False

    @property
    def progress(self) -> Progress:
        """How far training is after this step."""
        return Progress(self.step, self.epoch, self.batches, self.seconds)


def make_optimizer(objective: nn.Module, plan: TrainingPlan) -> torch.optim.Optimizer:
    """AdamW over the parameters that require gradients, of the distributed objective if it is.

    Raises:
        SettingsError: there are none.
    """
    trainable = _trainable(objective)
    if not trainable:
        raise SettingsError(
            "no parameter of the model requires gradients; there is nothing to train"
        )
    return torch.optim.AdamW(
        trainable, lr=plan.learning_rate, weight_decay=plan.weight_decay, fused=True
    )


def training_steps(
    objective: nn.Module,
    source: BatchSource[Any],
    plan: TrainingPlan,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    processes: Processes | None = None,
    evaluate: Callable[[], float] | None = None,
    start: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[Step]:
    """Train, yielding after every optimiser step.

    Args:
        objective: what to minimise, distributed if several processes take part; the parameters that
            require gradients are trained.
        source: what to learn from; the same on every process.
        plan: how.
        optimizer: what `make_optimizer` returned; made here if not given.
        processes: those that take part; by default this one alone.
        evaluate: measures the held-out loss; called every `plan.eval_steps` steps and after the
            last.
        start: where to go on; at the beginning by default.
        should_stop: asked once in every step; where it is true on any process, that step is the
            last on all of them. The loss is then measured only if the step was due for it.

    Raises:
        SettingsError: it is not known how many steps there are, or there is nothing to train.
        DataError: there are no rows.
        TrainingError: a loss or gradient is not finite, and the weights stay as before that step;
            or memory does not suffice.
    """
    optimizer = make_optimizer(objective, plan) if optimizer is None else optimizer
    trainable = _trainable(objective)
    processes = processes or Processes.alone(trainable[0].device)
    start = start or Progress()
    schedule = plan.learning_rates(source.batches_per_epoch(), processes.world_size)
    portions = _portions(source, plan.accumulation * processes.world_size, start)
    seconds = start.seconds
    with computing_in_tf32(plan.tf32), explaining_lack_of_memory():
        objective.train()
        for number in range(start.step + 1, schedule.steps + 1):
            started = time.perf_counter()
            if not objective.training:  # asked first, as setting it anew takes milliseconds
                objective.train()
            portion = next(portions)
            learning_rate = schedule.learning_rate(number - 1)
            share = accumulate_gradients(
                objective, source, portion.batches, processes, bf16=plan.bf16
            )
            norm = _clipped_norm(trainable, plan.max_gradient_norm)
            # The one moment in which the GPU is waited for.
            own_loss, total_norm = torch.stack((share.loss, norm.double())).tolist()
            wants_to_stop = should_stop is not None and should_stop()
            loss, tokens, stops = processes.sum([own_loss, share.tokens, float(wants_to_stop)])
            _require_finite(number, loss, total_norm)
            _update(optimizer, learning_rate)
            took = time.perf_counter() - started
            seconds += took
            is_due = number == schedule.steps or _divides(plan.eval_steps, number)
            yield Step(
                step=number,
                epoch=portion.epoch,
                loss=loss,
                learning_rate=learning_rate,
                gradient_norm=total_norm,
                tokens=int(tokens),
                tokens_per_second=tokens / took,
                seconds=seconds,
                eval_loss=evaluate() if evaluate is not None and is_due else None,
                batches=portion.end,
                ends_epoch=portion.ends_epoch,
            )
            if stops:
                return


class Share(NamedTuple):
    """What one process has done of a step.

    Attributes:
        loss: its part of the mean loss, a float64 scalar.
        tokens: tokens that went through the model, padding left out.
    """

    loss: Tensor
    tokens: int


def accumulate_gradients(
    objective: nn.Module,
    source: BatchSource[Any],
    batches: Sequence[Sequence[Any]],
    processes: Processes,
    *,
    bf16: bool = False,
) -> Share:
    """Add to the gradients those of the mean loss over all terms of `batches`.

    Args:
        objective: what to minimise, distributed if several processes take part.
        source: what the batches are from.
        batches: those of all processes, not yet collated.
        processes: those that take part; each collates and learns its own.
        bf16: compute in bfloat16 where that is safe.
    """
    device = processes.device
    terms = max(1, sum(map(source.weight, batches)))
    own = batches[processes.rank :: processes.world_size]
    passes = math.ceil(len(batches) / processes.world_size)
    loss, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    for number in range(passes):
        is_own = number < len(own)
        # A process without a batch of its own takes part for nothing: the others wait for it.
        batch = source.collate(own[number] if is_own else batches[0]).to(device)
        is_last = number == passes - 1
        with nullcontext() if is_last else deferred_reduction(objective):
            with computing_in_bf16(device, bf16):
                summed = objective(batch)
            # The processes' gradients are averaged where their sum is meant.
            scale = processes.world_size if is_own else 0
            (summed * scale / terms).backward()
        if is_own:
            loss += summed.detach()
            tokens += batch.size
    return Share(loss / terms, tokens)


class _Portion(NamedTuple):
    """The batches of one step, in which epoch they are, and how many of it are done with them."""

    epoch: int
    end: int
    ends_epoch: bool
    batches: list[Sequence[Any]]


def _portions(source: BatchSource[Any], size: int, start: Progress) -> Iterator[_Portion]:
    """The batches of each step, without end."""
    end = start.batches
    for epoch in count(start.epoch):
        batches = islice(source.batches(epoch), end, None)
        following = list(islice(batches, size))
        while following:
            portion, following = following, list(islice(batches, size))
            end += len(portion)
            yield _Portion(epoch, end, not following, portion)
        if end == 0:
            raise DataError("there is no row to train on; look at --data_path and --dataset_split")
        end = 0


def _trainable(objective: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in objective.parameters() if parameter.requires_grad]


def _divides(divisor: int, number: int) -> bool:
    return divisor > 0 and number % divisor == 0


def _clipped_norm(parameters: Sequence[nn.Parameter], most: float) -> Tensor:
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = whole(nn.utils.get_total_norm(gradients))
    if most > 0:
        nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm


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
