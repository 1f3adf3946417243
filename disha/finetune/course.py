"""Training from first to last step: evaluations, records, checkpoints, and going on from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

from disha.finetune.clock import Clock
from disha.finetune.errors import PeerError, SettingsError, TrainingError
from disha.finetune.inputs import Inputs
from disha.finetune.interruption import noticing_interruption
from disha.finetune.metrics import Metrics, recorded_steps, recording
from disha.finetune.progress import showing_progress
from disha.finetune.settings import FinetuneSettings
from disha.finetune.training.checkpoints import Checkpoints, SavedState
from disha.finetune.training.evaluation import mean_loss
from disha.finetune.training.loop import (
    Progress,
    Step,
    make_optimizer,
    planned_steps,
    training_steps,
)
from disha.finetune.training.parallel import Processes

__all__ = ["Course", "require_free_of_checkpoints", "train"]

NOT_DECISIVE = frozenset(
    {
        "config",
        "dataloader_num_workers",
        "debug",
        "dry_run",
        "gradient_accumulation_steps",
        "logging_steps",
        "merge",
        "output_dir",
        "overwrite_output_dir",
        "report_to",
        "resume",
        "save_steps",
        "save_strategy",
        "save_total_limit",
        "verify",
    }
)
"""Settings that may differ where training goes on: they decide nothing of what is learned."""


@dataclass(frozen=True)
class Course:
    """How training went.

    Args:
        steps: the optimiser steps; of those before a break, the ones that are on record.
        evaluations: the loss on the checked rows, by the number of steps done before.
        progress: how far training came, those before a break included.
        resumed_from: the checkpoint that this run went on from, if it did.
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
        """Over all of `steps`, evaluations left out; None where there are none."""
        seconds = sum(step.tokens / step.tokens_per_second for step in self.steps)
        return self.tokens / seconds if seconds else None


def require_free_of_checkpoints(settings: FinetuneSettings) -> None:
    """Check that no checkpoints of an earlier run are in the way.

    Raises:
        SettingsError: some are, and the settings do not say what to do with them.
    """
    output = settings.output
    found = sorted(output.output.glob("checkpoint-*"))
    if found and not (output.resume or output.overwrite_output_dir):
        raise SettingsError(
            f"--output_dir {output.output} holds {found[-1].name} of an earlier run; go on from it "
            "with --resume, begin anew with --overwrite_output_dir, or name another folder"
        )


def train(
    objective: nn.Module,
    inputs: Inputs,
    settings: FinetuneSettings,
    processes: Processes,
    clock: Clock,
) -> Course:
    """Train to the end, or to an interruption.

    Args:
        objective: what to minimise, distributed if several processes take part.
        inputs: what to learn from, and what to measure on.
        settings: of the run.
        processes: those that take part.
        clock: says what is being done.

    Raises:
        DishaError: training can't go on, or a file can't be written.
        KeyboardInterrupt: somebody asked to stop; the message says how to go on.
    """
    return _Training(objective, inputs, settings, processes, clock).run()


@dataclass
class _Training:
    """What one run of `train` works with."""

    objective: nn.Module
    inputs: Inputs
    settings: FinetuneSettings
    processes: Processes
    clock: Clock
    steps: list[Step] = field(default_factory=list)
    evaluations: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        output, training = self.settings.output, self.settings.training
        # Dropout differs between the processes, as their batches do.
        torch.manual_seed(training.seed + self.processes.rank)
        self.optimizer = make_optimizer(self.objective, training)
        self.checkpoints = Checkpoints(output.output, output.save_total_limit, self.processes)
        self.decisive = {
            name: str(value)
            for name, value in self.settings.to_json().items()
            if name not in NOT_DECISIVE
        }
        # Other processes may go on, if they make up steps of the same batches.
        batches = training.gradient_accumulation_steps * self.processes.world_size
        self.decisive["gradient_accumulation_steps times processes"] = str(batches)
        self.decisive["rows"] = self.inputs.digest()

    def run(self) -> Course:
        saved = self._saved()
        planned = planned_steps(
            self.settings.training,
            self.inputs.source.batches_per_epoch(),
            self.processes.world_size,
        )
        start = Progress() if saved is None else self._restore(saved)
        output = self.settings.output
        with recording(
            output.output,
            tensorboard=output.report_to == "tensorboard",
            after=None if saved is None else start.step,
            main=self.processes.is_main,
        ) as metrics:
            if saved is None:
                self._evaluate_before(metrics)
            with self.clock.phase("training, with evaluations"):
                end = self._train(start, planned, metrics)
        resumed_from = None if saved is None else saved.folder
        return Course(tuple(self.steps), self.evaluations, end, resumed_from)

    def _saved(self) -> SavedState | None:
        if not self.settings.output.resume:
            self.checkpoints.clear()
            return None
        saved = self.checkpoints.newest_good(self.clock.say)
        if saved is None:
            self.clock.say("no checkpoint to resume from; starting at the beginning")
        return saved

    def _restore(self, saved: SavedState) -> Progress:
        saved.require_agreement(self.decisive)
        self.checkpoints.restore(saved, self.objective, self.optimizer)
        self.evaluations.update({int(k): v for k, v in saved.history["evaluations"].items()})
        self.steps.extend(recorded_steps(self.settings.output.output, saved.progress.step))
        self.clock.say(f"resuming from {saved.folder}, after step {saved.progress.step}")
        return saved.progress

    def _evaluate_before(self, metrics: Metrics) -> None:
        name = self.inputs.checked.name
        with self.clock.phase(f"measuring the {name} loss before training"):
            self.evaluations[0] = self._evaluate()
        metrics.record_evaluation(0, self.evaluations[0])

    def _evaluate(self) -> float:
        found = mean_loss(
            self.objective,
            self.inputs.checked.batches(),
            processes=self.processes,
            bf16=self.settings.training.bf16,
            tf32=self.settings.training.tf32,
        )
        if not math.isfinite(found.loss):
            raise TrainingError(
                f"the {self.inputs.checked.name} loss is {found.loss}, which must be finite; "
                "use --bits fp32 or a lower --learning_rate, or check the model file"
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
            noticing_interruption(speaks=self.processes.is_main) as interruption,
            self._naming_checkpoint(),
        ):
            for step in training_steps(
                self.objective,
                self.inputs.source,
                self.settings.training,
                optimizer=self.optimizer,
                processes=self.processes,
                evaluate=self._evaluate,
                eval_steps=self.settings.output.eval_steps,
                start=start,
                should_stop=lambda: interruption.requested,
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
        return self.checkpoints.save(
            self.objective,
            self.optimizer,
            progress,
            settings=self.decisive,
            history={"evaluations": {str(k): v for k, v in self.evaluations.items()}},
        )

    def _leave(self, progress: Progress) -> NoReturn:
        folder = self._save(progress)
        if not self.processes.is_main:
            raise PeerError(f"interrupted after step {progress.step}, which the first process says")
        raise KeyboardInterrupt(
            f"interrupted after step {progress.step}; {folder} is complete: the same command with "
            "--resume goes on from there"
        )

    @contextmanager
    def _naming_checkpoint(self) -> Iterator[None]:
        """Add to a failure of training where it can be taken up again."""
        try:
            yield
        except TrainingError as error:
            newest = self.checkpoints.newest
            if newest is None:
                raise
            raise TrainingError(
                f"{error}. {newest} is complete: --resume goes on from there"
            ) from error
