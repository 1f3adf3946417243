"""The training loop: an optimizer of all trainable parameters, with exact gradient accumulation.

The loss of a step is the mean over the terms, such as learned tokens, of *all* its batches, on all
processes. So several small batches give the gradient of one large batch, whatever their lengths.

With A batches to accumulate and N processes, a step has A * N batches, or fewer at the end of an
epoch. Process k takes every Nth batch from the kth on. So N processes that accumulate A batches do
the same as one process that accumulates A * N. If another number of processes resumes a run, its
steps keep their batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from disha.finetune.data.batches import BatchSource
from disha.finetune.errors import DataError, TrainingError
from disha.finetune.settings import ScheduleName, TrainingSettings
from disha.finetune.training.machine import computing_in_tf32, explaining_lack_of_memory
from disha.finetune.training.optimizers import make_optimizer, trained
from disha.finetune.training.parallel import Processes, deferred_reduction, gathered

__all__ = [
    "Progress",
    "Share",
    "Step",
    "accumulate_gradients",
    "learning_rate",
    "planned_steps",
    "training_steps",
]

# The fraction of the steps after warm-up that is left -> the fraction of the peak rate.
# The cosine is written as a sine. Its square stays above 0 where 1 + cos is rounded to 0.
DECAYS: Mapping[ScheduleName, Callable[[float], float]] = {
    "cosine": lambda left: math.sin(math.pi / 2 * left) ** 2,
    "linear": lambda left: left,
    "constant": lambda left: 1.0,
}


@dataclass(frozen=True)
class Progress:
    """How far training is, and where in the data the next step begins.

    Args:
        step: how many optimizer steps are done.
        epoch: the pass over the examples, from 1.
        batches: how many batches of this epoch are done, on all processes.
        seconds: time spent training, without evaluations.
    """

    step: int = 0
    epoch: int = 1
    batches: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """What one optimizer step did, on all processes together.

    Args:
        step: its number, from 1.
        epoch: its pass over the examples, from 1.
        loss: mean over the step's terms before the update, in nats for tokens.
        learning_rate: the rate of this step.
        gradient_norm: the norm before clipping.
        tokens: tokens that went through the model, without padding.
        tokens_per_second: the speed of this step.
        seconds: time spent training so far, without evaluations.
        eval_loss: the held-out loss after this step, if it was measured.
        eval_exact_match: the fraction of answers that equal the response, if it was measured.
        batches: batches of this epoch that are done.
        ends_epoch: whether the epoch has no more batches.
    """

    step: int
    epoch: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    tokens_per_second: float
    seconds: float
    eval_loss: float | None = None
    eval_exact_match: float | None = None
    batches: int = 0
    ends_epoch: bool = False

    @property
    def progress(self) -> Progress:
        """How far training is after this step."""
        return Progress(self.step, self.epoch, self.batches, self.seconds)


def planned_steps(settings: TrainingSettings, batches: int, batches_per_step: int) -> int:
    """Return how many optimizer steps training has.

    Args:
        settings: how many epochs or steps are asked for.
        batches: how many batches an epoch has, for all processes.
        batches_per_step: how many of them a step has.
    """
    if settings.max_steps > 0:
        return settings.max_steps
    per_epoch = math.ceil(batches / batches_per_step)
    return max(1, math.ceil(settings.num_train_epochs * per_epoch))


def learning_rate(settings: TrainingSettings, step: int, steps: int) -> float:
    """Return the learning rate of a step: a linear warm-up, then a decay or a constant rate.

    With T steps, w of them to warm up, and s = 0, 1, ... T - 1:

        s < w       peak * (s + 1) / (w + 1)
        cosine      peak * (1 + cos(pi * (s - w) / (T - w))) / 2
        linear      peak * (T - s) / (T - w)
        constant    peak

    The usual warm-up is s / w, so its first step has the rate zero and learns nothing. Here no step
    has the rate zero.

    Args:
        settings: the peak, the schedule, and the fraction of the steps that warm up.
        step: its number s, from 0.
        steps: the number of steps.
    """
    peak, warmup = settings.learning_rate, math.ceil(steps * settings.warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * DECAYS[settings.lr_scheduler_type]((steps - step) / (steps - warmup))


def training_steps(
    objective: nn.Module,
    source: BatchSource[Any],
    settings: TrainingSettings,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    processes: Processes | None = None,
    start: Progress | None = None,
    batches_per_step: int | None = None,
) -> Iterator[Step]:
    """Train, yielding after every optimizer step.

    Args:
        objective: what to minimise, distributed if several processes take part. Its parameters that
            require gradients are trained.
        source: the batches to learn from; the same on every process.
        settings: the settings of training.
        optimizer: from `make_optimizer`; made here if not given.
        processes: the processes that take part; by default, only this one.
        start: where to resume; by default, training starts at the beginning.
        batches_per_step: how many batches a step has, on all processes; by default, as many as the
            settings say.

    Raises:
        SettingsError: there is nothing to train.
        DataError: there are no rows.
        TrainingError: memory runs out, or a loss or gradient is not finite; the weights then stay
            as they were before that step.
        Interrupted: a signal asked one of the processes to stop. The weights stay as they were
            before the step that was under way; random numbers may have been drawn for it.
    """
    optimizer = make_optimizer(objective, settings) if optimizer is None else optimizer
    trainable = trained(objective)
    processes = processes or Processes.alone(trainable[0].device)
    start = start or Progress()
    size = batches_per_step or settings.gradient_accumulation_steps * processes.world_size
    steps = planned_steps(settings, source.batches_per_epoch(), size)
    portions = _portions(source, size, start)
    seconds = start.seconds
    with computing_in_tf32(settings.tf32), explaining_lack_of_memory():
        objective.train()
        for number in range(start.step + 1, steps + 1):
            started = time.perf_counter()
            if not objective.training:  # ask first, because setting the mode takes milliseconds
                objective.train()
            with processes.interruptible():
                portion = next(portions)
                share = accumulate_gradients(
                    objective, source, portion.batches, processes, bf16=settings.bf16
                )
                norm = nn.utils.clip_grad_norm_(trainable, settings.max_grad_norm or math.inf)
                # A step waits for the GPU only here.
                own_loss, total_norm = torch.stack((share.loss, gathered(norm).double())).tolist()
            loss, tokens = processes.sum([own_loss, share.tokens])
            _require_finite(number, loss, total_norm)
            rate = learning_rate(settings, number - 1, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            took = time.perf_counter() - started
            seconds += took
            yield Step(
                step=number,
                epoch=portion.epoch,
                loss=loss,
                learning_rate=rate,
                gradient_norm=total_norm,
                tokens=int(tokens),
                tokens_per_second=tokens / took,
                seconds=seconds,
                batches=portion.end,
                ends_epoch=portion.ends_epoch,
            )


class Share(NamedTuple):
    """The share of a step that one process has computed.

    Attributes:
        loss: its part of the mean loss, a float64 scalar.
        tokens: tokens that went through the model, without padding.
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
    """Add the gradients of the mean loss over all terms of `batches`.

    Args:
        objective: what to minimise, distributed if several processes take part.
        source: the source of the batches.
        batches: the batches of all processes, before they are collated.
        processes: the processes that take part; each uses its own batches.
        bf16: compute in bfloat16 where that is safe.

    Raises:
        Interrupted: a signal asked one of the processes to stop.
    """
    device = processes.device
    terms = max(1, sum(map(source.weight, batches)))
    own = batches[processes.rank :: processes.world_size]
    passes = math.ceil(len(batches) / processes.world_size)
    loss, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    for number in range(passes):
        processes.check_signals()
        is_own = number < len(own)
        # A process without a batch of its own computes too, because the others wait for it. Its
        # result does not count.
        batch = source.collate(own[number] if is_own else batches[0]).to(device)
        is_last = number == passes - 1
        with nullcontext() if is_last else deferred_reduction(objective):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                summed = objective(batch)
            # The processes average their gradients, but the step needs the sum.
            scale = processes.world_size if is_own else 0
            (summed * scale / terms).backward()
        if is_own:
            loss += summed.detach()
            tokens += batch.size
    return Share(loss / terms, tokens)


class _Portion(NamedTuple):
    """The batches of one step, their epoch, and how many of its batches are done after the step."""

    epoch: int
    end: int
    ends_epoch: bool
    batches: list[Sequence[Any]]


def _portions(source: BatchSource[Any], size: int, start: Progress) -> Iterator[_Portion]:
    """Yield the batches of each step, for endless epochs."""
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


def _require_finite(step: int, loss: float, norm: float) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    raise TrainingError(
        f"training stopped at step {step}: loss {loss}, gradient norm {norm}, which must both be "
        "finite; lower --learning_rate, or use --bits fp32, or look at the data"
    )
