"""Training from the first to the last step: evaluations, records, checkpoints, and resuming.

A signal such as Ctrl-C stops the current step or evaluation, and a checkpoint of the last complete
step is saved. The resumed run repeats the step or evaluation that was stopped, and gets the same
result. Signals wait while weights are updated, and while a step is recorded.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from disha import AdapterStateError
from disha.finetune.errors import PeerError, TrainingError
from disha.finetune.evaluating import exact_answers, first_questions, perplexity_of
from disha.finetune.folder_lock import FolderLock
from disha.finetune.hashing import file_hash
from disha.finetune.inputs import Inputs
from disha.finetune.metrics import Metrics, recorded_steps, recording
from disha.finetune.progress import Clock, ShowStep, showing_progress
from disha.finetune.resuming import Setup, batches_per_step
from disha.finetune.settings import FinetuneSettings
from disha.finetune.stopping import Interrupted, forget_signal
from disha.finetune.training.checkpoints import (
    Checkpoints,
    SavedState,
    adapter_values,
    random_state,
    restore_random_state,
    set_adapter_values,
)
from disha.finetune.training.evaluation import mean_loss
from disha.finetune.training.loop import (
    Progress,
    Step,
    planned_steps,
    training_steps,
)
from disha.finetune.training.optimizers import make_optimizer
from disha.finetune.training.parallel import Processes, undistributed
from disha.text import counted, tell

__all__ = ["Course", "train"]

MOST_ANSWERS, MOST_TOKENS = 64, 128
"""How many held-out rows are answered for `--metric_for_best_model exact_match`, and how long."""


@dataclass(frozen=True)
class Course:
    """The result of training.

    Args:
        steps: the optimizer steps. Steps before a resume are here if they were recorded.
        evaluations: the loss on the checked rows, by the number of steps done before it.
        progress: how far training came, including the steps before a resume.
        resumed_from: the checkpoint that this run resumed from, if any.
        best: the best step, if the model now has its adapter and not that of the last step.
        stopped_early: whether training stopped because measurements no longer got better.
    """

    steps: tuple[Step, ...]
    evaluations: Mapping[int, float]
    progress: Progress
    resumed_from: Path | None
    best: int | None
    stopped_early: bool

    @property
    def before(self) -> float:
        """The loss on the checked rows before training."""
        return self.evaluations[0]

    @property
    def after(self) -> float:
        """The loss on the checked rows after training, with the adapter that is saved."""
        return self.evaluations[max(self.evaluations) if self.best is None else self.best]

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
    """Train until the end or an interruption. Call this inside `raising(False)`.

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
        Interrupted: a signal asked to stop; the message says how to resume.
    """
    with processes.interruptible():
        training = _Training(objective, inputs, settings, processes, clock, lock, base)
    try:
        course = training.run()
    except Interrupted as interruption:
        training.leave(interruption)
    # If a signal came after the last step, the run ends as usual.
    forget_signal()
    return course


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
    exact_matches: dict[int, float] = field(default_factory=dict)
    """The fraction of exact answers, by steps as in `evaluations`, if it decides what is best."""
    best: Mapping[str, Tensor] | None = None
    """The adapter of the best step, if it is to be kept."""
    progress: Progress = field(default_factory=Progress)
    unmeasured: Step | None = None
    """The last step, while the loss after it is not measured yet."""
    random: Mapping[str, Any] = field(default_factory=dict)
    """The random state after the last step."""

    def __post_init__(self) -> None:
        output, training = self.settings.output, self.settings.training
        # Dropout must differ between processes, because their batches differ.
        torch.manual_seed(training.seed + self.processes.rank)
        self.optimizer = make_optimizer(self.objective, training)
        self.checkpoints = Checkpoints(output.output, output.save_total_limit, self.processes)

    def run(self) -> Course:
        saved = self._saved()
        with self.processes.interruptible():  # reading all rows again may take long
            self.setup = self._agreed(saved)
        planned = self.setup.steps
        if saved is not None:
            self._restore(saved)
        self.random = random_state()
        output, name = self.settings.output, self.inputs.checked.name
        with recording(
            self.lock,
            reports=output.reports,
            settings=self.settings.to_json(),
            after=None if saved is None else self._recorded,
            main=self.processes.is_main,
        ) as metrics:
            if saved is None:
                with self.clock.phase(f"measuring the {name} loss before training"):
                    metrics.record_evaluation(0, **self._measure(0))
            with self.clock.phase("training, with evaluations"):
                self._train(planned, metrics)
        folder = None if saved is None else saved.folder
        best = self._take_best()
        early = self.progress.step < planned
        return Course(tuple(self.steps), self.evaluations, self.progress, folder, best, early)

    @property
    def _recorded(self) -> int:
        """The last step that is already recorded when a run resumes."""
        return self.progress.step - (self.unmeasured is not None)

    def _saved(self) -> SavedState | None:
        if not self.settings.output.resume:
            self.checkpoints.clear()
            return None
        saved = self.checkpoints.newest_good(self.clock.say)
        if saved is None:
            self.clock.say("no checkpoint to resume from; starting at the beginning")
        return saved

    def _agreed(self, saved: SavedState | None) -> Setup:
        """Return the setup of this run. Raise if it does not agree with the run to resume."""
        training, source = self.settings.training, self.inputs.source
        folder = self.settings.output.output if saved is None else saved.folder
        before = None if saved is None else Setup(**saved.setup)
        size = batches_per_step(training, self.processes.world_size, before, folder)
        # One process reads streamed files, and the others wait.
        rows = self.processes.broadcast(self.inputs.contents() if self.processes.is_main else {})
        start = self.settings.adapter.adapter
        first = "new" if start is None else file_hash(start)
        contents = {"base model": self.base, "adapter to start from": first, **rows}
        planned = planned_steps(training, source.batches_per_epoch(), size)
        setup = Setup.of(self.settings, contents, size, planned)
        if before is not None and saved is not None:
            setup.require_agreement(before, folder, saved.progress.step)
        return setup

    def _restore(self, saved: SavedState) -> None:
        best = self.checkpoints.restore(saved, self.objective, self.optimizer)
        if self.settings.training.load_best_model_at_end:
            self.best = best
        self.progress = saved.progress
        unmeasured = saved.history["unmeasured"]
        self.unmeasured = None if unmeasured is None else Step(**unmeasured)
        self.evaluations.update(saved.history["evaluations"])
        self.exact_matches.update(saved.history["exact_matches"])
        self.steps.extend(recorded_steps(self.settings.output.output, self._recorded))
        self.clock.say(f"resuming from {saved.folder}, after step {saved.progress.step}")

    def _measure(self, step: int) -> dict[str, float]:
        """Measure the model after a step, and keep its adapter if it is the best one so far."""
        training, measured = self.settings.training, {"eval_loss": self._evaluate()}
        if training.metric_for_best_model == "exact_match":
            measured["eval_exact_match"] = self.exact_matches[step] = self._exact_match()
        self.evaluations[step] = measured["eval_loss"]
        if training.load_best_model_at_end and self._best_step == step:
            self.best = adapter_values(self.objective)
        return measured

    def _exact_match(self) -> float:
        """Return the fraction of the first held-out rows that the model answers exactly."""
        encoder, processes = self.inputs.encoder, self.processes
        assert encoder is not None
        model = undistributed(self.objective).model
        with processes.interruptible():
            questions = first_questions(self.inputs.dataset.held_out, encoder, MOST_ANSWERS)
            own = questions[processes.rank :: processes.world_size]
            exact = exact_answers(
                model, encoder.tokenizer, own, max_new_tokens=MOST_TOKENS, size=MOST_ANSWERS
            )
        [total] = processes.sum([exact])
        return total / len(questions)

    @property
    def _best_step(self) -> int:
        """The first of the steps with the best measurement."""
        if self.settings.training.metric_for_best_model == "exact_match":
            return max(self.exact_matches, key=self.exact_matches.__getitem__)
        return min(self.evaluations, key=self.evaluations.__getitem__)

    @property
    def _stops_early(self) -> bool:
        """Whether the measurements after the best one are as many as patience allows."""
        patience = self.settings.training.early_stopping_patience
        worse = sum(step > self._best_step for step in self.evaluations)
        return patience is not None and worse >= patience

    def _take_best(self) -> int | None:
        """Give the model the adapter of the best step. Return the step, if it is not the last."""
        settings, best, last = self.settings.training, self._best_step, self.progress.step
        if last < self.setup.steps:
            waited = counted(settings.early_stopping_patience or 0, "measurement")
            self.clock.say(
                f"stopped early after step {last}: {waited} without a better value than the "
                f"{self._figure(best)} of step {best}"
            )
        if self.best is None or best == last:
            return None
        set_adapter_values(self.objective, self.best)
        self.clock.say(f"the adapter is that of step {best}: {self._figure(best)}")
        return best

    def _figure(self, step: int) -> str:
        """Return what was measured after a step, in words."""
        metric, loss = self.settings.training.metric_for_best_model, self.evaluations[step]
        if metric == "exact_match":
            return f"{self.exact_matches[step]:.1%} of answers exact"
        value = perplexity_of(loss) if metric == "perplexity" else loss
        return f"{self.inputs.checked.name} {metric} {value:.4f}"

    def _evaluate(self) -> float:
        checked, training = self.inputs.checked, self.settings.training
        with self.processes.interruptible():
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

    def _train(self, planned: int, metrics: Metrics) -> None:
        with (
            showing_progress(
                planned,
                self.settings.output.logging_steps,
                first=self._recorded,
                checked=self.inputs.checked.name,
                shown=self.processes.is_main,
            ) as show,
            self._naming_checkpoint(),
        ):
            following = training_steps(
                self.objective,
                self.inputs.source,
                self.settings.training,
                optimizer=self.optimizer,
                processes=self.processes,
                start=self.progress,
                batches_per_step=self.setup.batches_per_step,
            )
            before_resuming = [] if self.unmeasured is None else [self.unmeasured]
            steps = itertools.chain(before_resuming, following)
            while not self._stops_early and (step := next(steps, None)) is not None:
                self._complete(step, planned, metrics, show)

    def _complete(self, step: Step, planned: int, metrics: Metrics, show: ShowStep) -> None:
        """Measure the loss after a step if that is due, record the step, and save it if due."""
        self.progress, self.random = step.progress, random_state()
        every = self.settings.data.eval_steps
        if step.step == planned or (every > 0 and step.step % every == 0):
            self.unmeasured = step
            step, self.unmeasured = replace(step, **self._measure(step.step)), None  # type: ignore[arg-type]
        metrics.record_step(step)
        show(step)
        self.steps.append(step)
        if self._is_due(step):
            self._save()

    def _is_due(self, step: Step) -> bool:
        output = self.settings.output
        if output.save_strategy == "steps":
            return step.step % output.save_steps == 0
        return output.save_strategy == "epoch" and step.ends_epoch

    def _save(self) -> Path:
        self.processes.on_main(self.lock.keep)
        unmeasured = self.unmeasured
        is_other = self.best is not None and self._best_step != self.progress.step
        return self.checkpoints.save(
            self.objective,
            self.optimizer,
            self.progress,
            setup=vars(self.setup),
            history={
                "evaluations": dict(self.evaluations),
                "exact_matches": dict(self.exact_matches),
                "unmeasured": None if unmeasured is None else asdict(unmeasured),
            },
            best=self.best if is_other else None,
            now=self.inputs.now,
        )

    def leave(self, interruption: Interrupted) -> NoReturn:
        """Save a checkpoint after the last complete step, and say how to resume from it."""
        step, number = self.progress.step, interruption.number
        if step == 0:
            told = "interrupted before the end of the first step; run the same command again"
        else:
            if self.processes.is_main:
                tell("\nsaving a checkpoint; press Ctrl-C again to stop at once", sys.stderr)
            self.optimizer.zero_grad(set_to_none=True)
            restore_random_state(self.random)
            told = (
                f"interrupted after step {step}; {self._save()} is complete: the same command with "
                "--resume goes on from there"
            )
        if not self.processes.is_main:
            raise PeerError(f"interrupted after step {step}; the first process says more")
        raise Interrupted(number, told) from interruption

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
