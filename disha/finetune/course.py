"""Training from the first to the last step: evaluations, records, checkpoints, and resuming.

Ctrl-C finishes the current step and saves a checkpoint, because a step that is interrupted in the
middle would leave blocks half updated. A second Ctrl-C stops at once.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
from torch import nn

from disha import AdapterStateError
from disha.finetune.errors import PeerError, TrainingError
from disha.finetune.folder_lock import FolderLock
from disha.finetune.inputs import Inputs
from disha.finetune.metrics import Metrics, recorded_steps, recording
from disha.finetune.progress import Clock, showing_progress
from disha.finetune.resuming import Setup, batches_per_step
from disha.finetune.settings import FinetuneSettings
from disha.finetune.training.checkpoints import Checkpoints, SavedState, usable
from disha.finetune.training.evaluation import mean_loss
from disha.finetune.training.loop import (
    Progress,
    Step,
    make_optimizer,
    planned_steps,
    training_steps,
)
from disha.finetune.training.parallel import Processes

__all__ = ["Course", "noticing_interruption", "train"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)
TOGETHER = 1.0
"""Seconds in which several signals count as one. Under torchrun, one Ctrl-C sends two signals: one
from the terminal, and one from torchrun."""


@dataclass(frozen=True)
class Course:
    """The result of training.

    Args:
        steps: the optimiser steps; of steps before a resume, those that were recorded.
        evaluations: the loss on the checked rows, by the number of steps done before it.
        progress: how far training came, including the steps before a resume.
        resumed_from: the checkpoint that this run resumed from, if any.
    """

    steps: tuple[Step, ...]
    evaluations: Mapping[int, float]
    progress: Progress
    resumed_from: Path | None

    @property
    def before(self) -> float:
        """The loss on the checked rows before training."""
        return self.evaluations[0]

    @property
    def after(self) -> float:
        """The loss on the checked rows after training."""
        return self.evaluations[max(self.evaluations)]

    @property
    def tokens(self) -> int:
        """Tokens, or samples, that went through the model in `steps`."""
        return sum(step.tokens for step in self.steps)

    @property
    def tokens_per_second(self) -> float | None:
        """The speed over all `steps`, without evaluations; None if there are no steps."""
        seconds = sum(step.tokens / step.tokens_per_second for step in self.steps)
        return self.tokens / seconds if seconds else None


def train(
    objective: nn.Module,
    inputs: Inputs,
    settings: FinetuneSettings,
    processes: Processes,
    clock: Clock,
    lock: FolderLock,
    base: str,
) -> Course:
    """Train until the end or an interruption.

    Args:
        objective: what to minimise, distributed if several processes take part.
        inputs: the batches to learn from, and the rows to measure on.
        settings: the settings of the run.
        processes: the processes that take part.
        clock: prints each phase of the work.
        lock: the lock of the output folder, which the main process holds.
        base: a hash of the base model.

    Raises:
        DishaError: training can't continue, or a file can't be written.
        KeyboardInterrupt: somebody asked to stop; the message says how to resume.
    """
    return _Training(objective, inputs, settings, processes, clock, lock, base).run()


@dataclass
class _Training:
    """The state of one run of `train`."""

    objective: nn.Module
    inputs: Inputs
    settings: FinetuneSettings
    processes: Processes
    clock: Clock
    lock: FolderLock
    base: str
    steps: list[Step] = field(default_factory=list)
    evaluations: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        output, training = self.settings.output, self.settings.training
        # Dropout must differ between processes, because their batches differ.
        torch.manual_seed(training.seed + self.processes.rank)
        self.optimizer = make_optimizer(self.objective, training)
        self.checkpoints = Checkpoints(output.output, output.save_total_limit, self.processes)

    def run(self) -> Course:
        saved = self._saved()
        self.setup = self._agreed(saved)
        planned = self.setup.steps
        start = Progress() if saved is None else self._restore(saved)
        output, name = self.settings.output, self.inputs.checked.name
        with recording(
            self.lock,
            tensorboard=output.report_to == "tensorboard",
            after=None if saved is None else start.step,
            main=self.processes.is_main,
        ) as metrics:
            if saved is None:
                with self.clock.phase(f"measuring the {name} loss before training"):
                    self.evaluations[0] = self._evaluate()
                metrics.record_evaluation(0, self.evaluations[0])
            with self.clock.phase("training, with evaluations"):
                end = self._train(start, planned, metrics)
        return Course(tuple(self.steps), self.evaluations, end, saved.folder if saved else None)

    def _saved(self) -> SavedState | None:
        if not self.settings.output.resume:
            self.checkpoints.clear()
            return None
        saved = self.checkpoints.newest_good(self.clock.say)
        if saved is None:
            self.clock.say("no checkpoint to resume from; starting at the beginning")
        return saved

    def _agreed(self, saved: SavedState | None) -> Setup:
        """Return the setup of this run, which agrees with that of the run to resume."""
        training, source = self.settings.training, self.inputs.source
        folder = self.settings.output.output if saved is None else saved.folder
        with usable(folder):
            before = None if saved is None else Setup.saved_as(saved.setup)
            size = batches_per_step(training, self.processes.world_size, before, folder)
        # One process reads streamed files, and the others wait.
        rows = self.processes.broadcast(self.inputs.contents() if self.processes.is_main else {})
        contents = {"base model": self.base, **rows}
        planned = planned_steps(training, source.batches_per_epoch(), size)
        setup = Setup.of(self.settings, contents, size, planned)
        if before is not None and saved is not None:
            with usable(folder):
                setup.require_agreement(before, folder, saved.progress.step)
        return setup

    def _restore(self, saved: SavedState) -> Progress:
        self.checkpoints.restore(saved, self.objective, self.optimizer)
        with usable(saved.folder):
            evaluations = saved.history["evaluations"].items()
            self.evaluations.update({int(step): float(loss) for step, loss in evaluations})
        self.steps.extend(recorded_steps(self.settings.output.output, saved.progress.step))
        self.clock.say(f"resuming from {saved.folder}, after step {saved.progress.step}")
        return saved.progress

    def _evaluate(self) -> float:
        checked, training = self.inputs.checked, self.settings.training
        found = mean_loss(
            self.objective,
            checked.batches(),
            processes=self.processes,
            bf16=training.bf16,
            tf32=training.tf32,
        )
        if not math.isfinite(found.loss):
            raise TrainingError(
                f"the {checked.name} loss is {found.loss}, which must be finite; use --bits fp32 "
                "or a lower --learning_rate, or check the model file"
            )
        return found.loss

    def _train(self, start: Progress, planned: int, metrics: Metrics) -> Progress:
        progress = start
        with (
            showing_progress(
                planned,
                self.settings.output.logging_steps,
                first=start.step,
                checked=self.inputs.checked.name,
                shown=self.processes.is_main,
            ) as show,
            noticing_interruption(prints=self.processes.is_main) as is_interrupted,
            self._naming_checkpoint(),
        ):
            for step in training_steps(
                self.objective,
                self.inputs.source,
                self.settings.training,
                optimizer=self.optimizer,
                processes=self.processes,
                evaluate=self._evaluate,
                eval_steps=self.settings.data.eval_steps,
                start=start,
                batches_per_step=self.setup.batches_per_step,
                should_stop=is_interrupted,
            ):
                metrics.record_step(step)
                show(step)
                self.steps.append(step)
                if step.eval_loss is not None:
                    self.evaluations[step.step] = step.eval_loss
                progress = step.progress
                if self._is_due(step):
                    self._save(progress)
        if progress.step < planned:
            self._leave(progress)
        return progress

    def _is_due(self, step: Step) -> bool:
        output = self.settings.output
        if output.save_strategy == "steps":
            return step.step % output.save_steps == 0
        return output.save_strategy == "epoch" and step.ends_epoch

    def _save(self, progress: Progress) -> Path:
        self.processes.on_main(self.lock.keep)
        return self.checkpoints.save(
            self.objective,
            self.optimizer,
            progress,
            setup=vars(self.setup),
            history={"evaluations": {str(k): v for k, v in self.evaluations.items()}},
        )

    def _leave(self, progress: Progress) -> NoReturn:
        folder = self._save(progress)
        if not self.processes.is_main:
            raise PeerError(f"interrupted after step {progress.step}; the first process says more")
        raise KeyboardInterrupt(
            f"interrupted after step {progress.step}; {folder} is complete: the same command with "
            "--resume goes on from there"
        )

    @contextmanager
    def _naming_checkpoint(self) -> Iterator[None]:
        """If training fails, add the newest checkpoint to the message."""
        try:
            yield
        except (TrainingError, AdapterStateError) as error:  # the latter: values are not finite
            newest = self.checkpoints.newest
            way_on = (
                "" if newest is None else f". {newest} is complete: --resume goes on from there"
            )
            raise TrainingError(f"{error}{way_on}") from error


@contextmanager
def noticing_interruption(*, prints: bool = True) -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C was pressed, or the process was told to end.

    A second signal raises KeyboardInterrupt.

    Args:
        prints: whether this process prints what a second signal does.
    """
    requested: list[float] = []

    def request(number: int, frame: FrameType | None) -> None:
        requested.append(time.monotonic())
        if requested[-1] - requested[0] > TOGETHER:
            raise KeyboardInterrupt
        if prints and len(requested) == 1:
            line = "\nstopping after this step; press Ctrl-C again to stop at once"
            print(line, file=sys.stderr, flush=True)

    in_main_thread = threading.current_thread() is threading.main_thread()
    # Other threads can't handle signals.
    before = {n: signal.signal(n, request) for n in SIGNALS} if in_main_thread else {}
    try:
        yield lambda: bool(requested)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
