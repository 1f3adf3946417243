"""What must be as before when a run resumes, and what may change.

A resumed run ends as the new command would have ended without an interruption. So a change is
refused if the steps already done would have been different. Every setting must be as before, except
for those in `HARMLESS`, `ROUNDING` and `MAY_CHANGE`.

Checkpoints of other versions may have other settings. A setting that only one of the two versions
has does not matter if it has its default.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disha.finetune.errors import SettingsError
from disha.finetune.settings import FinetuneSettings, OutputSettings, TrainingSettings
from disha.finetune.training.loop import learning_rate

__all__ = ["Setup", "batches_per_step"]

REMEDY = "to resume, or leave --resume out to start over"

HARMLESS = (
    *("eval_steps", "streaming", "dataloader_num_workers", "config", "dry_run", "debug"),
    *(one.name for one in dataclasses.fields(OutputSettings)),
)
"""Settings that may change, because they do not affect what is learned."""

ROUNDING = ("strategy", "gradient_checkpointing", "compile")
"""Settings that may change, because only the rounding of the results depends on them."""

FINDING: Mapping[str, tuple[str, ...]] = {
    "base model": ("base_model_name_or_path", "demo"),
    "adapter to start from": ("adapter",),
    "set of rows": (
        *("data_path", "dataset_split", "dataset_field", "template", "tokenizer"),
        *("skip_bad_rows", "eval_fraction", "demo"),
    ),
    "set of held-out rows": (
        *("eval_path", "eval_split", "eval_fraction", "data_path", "dataset_field", "template"),
        *("tokenizer", "skip_bad_rows", "demo"),
    ),
}
"""What must stay the same -> the settings that name it. They may change if it stays the same."""

RATES = ("max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_type", "warmup_ratio")
"""Settings that may change if the steps already done keep their learning rates."""

MAY_CHANGE = frozenset({*itertools.chain(*FINDING.values()), *RATES, "gradient_accumulation_steps"})
"""The settings that affect what is learned, and may still change. Each has a rule of its own."""


@dataclass(frozen=True)
class Setup:
    """What the steps of a run depend on. A checkpoint holds it as plain data.

    Args:
        settings: the values of the settings that count, by name.
        changed: the names of those that don't have their default.
        contents: hashes of the base model and the rows.
        batches_per_step: how many batches a step has, on all processes.
        steps: how many steps are planned.
    """

    settings: Mapping[str, Any]
    changed: tuple[str, ...]
    contents: Mapping[str, str]
    batches_per_step: int
    steps: int

    @classmethod
    def of(
        cls,
        settings: FinetuneSettings,
        contents: Mapping[str, str],
        batches_per_step: int,
        steps: int,
    ) -> Setup:
        """Return the setup of a run with these settings."""
        found, defaults = _that_count(settings), FinetuneSettings().to_json()
        changed = tuple(name for name in found if found[name] != defaults[name])
        return cls(found, changed, contents, batches_per_step, steps)

    def require_agreement(self, saved: Setup, folder: Path, done: int) -> None:
        """Check that a run with this setup can resume.

        Args:
            saved: the setup that the run had when the checkpoint was saved.
            folder: the checkpoint.
            done: how many steps were done.

        Raises:
            SettingsError: something differs that must not; the message names it.
        """
        for name in dict.fromkeys([*self.settings, *saved.settings]):
            if name not in MAY_CHANGE and not self._agrees_in(name, saved):
                raise SettingsError(
                    f"{folder} was saved with {saved.value_of(name)}, but this run has "
                    f"{self.value_of(name)}; use the same settings {REMEDY}"
                )
        for what, digest in self.contents.items():
            if saved.contents.get(what, digest) != digest:
                raise SettingsError(
                    f"{folder} was saved with another {what}: {self._difference(what, saved)}; "
                    f"use the same {what} {REMEDY}"
                )
        self._require_same_rates(saved, folder, done)

    def value_of(self, name: str) -> str:
        """Return a flag and its value, for messages."""
        if name not in self.settings:
            return f"no --{name}"
        value = self.settings[name]
        return f"--{name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"

    def _agrees_in(self, name: str, saved: Setup) -> bool:
        if name in self.settings and name in saved.settings:
            return bool(self.settings[name] == saved.settings[name])
        return name not in self.changed and name not in saved.changed

    def _difference(self, what: str, saved: Setup) -> str:
        found = [
            f"it has {self.value_of(name)} instead of {saved.value_of(name)}"
            for name in FINDING[what]
            if not self._agrees_in(name, saved)
        ]
        return ", ".join(found) or "the settings are the same, but what they name has changed"

    def _require_same_rates(self, saved: Setup, folder: Path, done: int) -> None:
        if self.steps < done:
            raise SettingsError(
                f"{folder} was saved after step {done}, but this run has {self.steps} steps; ask "
                f"for more steps {REMEDY}"
            )
        if self._rates(done) != saved._rates(done):
            names = [name for name in RATES if not self._agrees_in(name, saved)]
            raise SettingsError(
                f"{folder} was saved with {saved._plan_in(names)}, but this run has "
                f"{self._plan_in(names)}, so the steps already done would have had other learning "
                f"rates; use the same settings {REMEDY}"
            )

    def _plan_in(self, names: list[str]) -> str:
        return ", ".join([*map(self.value_of, names), f"{self.steps} steps in total"])

    def _rates(self, done: int) -> list[float]:
        chosen = {name: self.settings[name] for name in RATES if name in self.settings}
        plan = dataclasses.replace(TrainingSettings(), **chosen)
        return [learning_rate(plan, step, self.steps) for step in range(done)]


def _that_count(settings: FinetuneSettings) -> dict[str, Any]:
    """Return the settings that change what is learned by more than rounding."""
    found = {k: v for k, v in settings.to_json().items() if k not in {*HARMLESS, *ROUNDING}}
    if settings.training.comparing is not None:
        # It comes last, so that an error names the flag that makes it count before it.
        found["eval_steps"] = settings.data.eval_steps
    return found


def batches_per_step(
    settings: TrainingSettings, processes: int, saved: Setup | None, folder: Path
) -> int:
    """Return how many batches a step has, on all processes. A resumed run has as many as before.

    If the number of processes has changed, they share the batches of a step in another way. Then
    the flag may stay as it is, or change so that a step has as many batches as before.

    Args:
        settings: the settings of training.
        processes: how many processes share the batches.
        saved: the setup of the run to resume; None for a new run.
        folder: the checkpoint, for messages.

    Raises:
        SettingsError: the run had another number of batches, and the flag has changed.
    """
    name = "gradient_accumulation_steps"
    asked = settings.gradient_accumulation_steps * processes
    if saved is None or settings.gradient_accumulation_steps == saved.settings[name]:
        return asked if saved is None else saved.batches_per_step
    if asked != saved.batches_per_step:
        raise SettingsError(
            f"{folder} was saved with {saved.value_of(name)} and {saved.batches_per_step} batches "
            f"in a step, but this run has --{name} {settings.gradient_accumulation_steps} and "
            f"{asked}; use the same settings {REMEDY}"
        )
    return asked
