"""What the results say, as numbers; no file is read and nothing is written here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.convergence.methods import FULL
from benchmarks.convergence.plan import Results, Study, best_rate, tried
from benchmarks.convergence.runs import Cell, Run

__all__ = ["Costs", "Finding", "Mean", "TaskFindings", "differ", "finding", "task_findings"]

STUDENT_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
"""Two-sided 95% quantiles of Student's t by degrees of freedom."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and the standard deviation of one seed's value."""

    value: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Return those of at least one value."""
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(statistics.fmean(values), spread)


@dataclass(frozen=True)
class Costs:
    """What a step takes.

    Args:
        seconds: the median.
        ratio: the median of seconds over LoRA's, round by round.
        peak_bytes: allocated in a step.
    """

    seconds: float
    ratio: float
    peak_bytes: int


@dataclass(frozen=True)
class Finding:
    """A finished cell at its best learning rate.

    Args:
        cell: what it is.
        rate: the learning rate chosen.
        searched: learning rate -> final validation loss of the first seed; inf if it diverged.
        records: what each seed's run found.
    """

    cell: Cell
    rate: float
    searched: Mapping[float, float]
    records: tuple[Mapping[str, Any], ...]

    def mean(self, key: str) -> Mean:
        """Return a number of the runs."""
        return Mean.of([record[key] for record in self.records])

    @property
    def parameters(self) -> int:
        """How many train."""
        return int(self.records[0]["parameters"])

    @property
    def steps(self) -> list[int]:
        """At which the validation loss was measured."""
        return list(self.records[0]["steps"])

    @property
    def curve(self) -> list[float]:
        """The validation loss at those, the mean of the seeds."""
        curves = [record["validation"] for record in self.records]
        return [statistics.fmean(losses) for losses in zip(*curves, strict=True)]

    @property
    def band(self) -> tuple[list[float], list[float]]:
        """The lowest and the highest of the seeds at those steps."""
        losses = list(zip(*(record["validation"] for record in self.records), strict=True))
        return [min(one) for one in losses], [max(one) for one in losses]

    @property
    def early_gradient(self) -> Mean:
        """The mean norm of the first gradients: behind a new head of zeros the very first is 0."""
        return Mean.of([statistics.fmean(record["gradient_norms"]) for record in self.records])

    @property
    def gradients(self) -> list[float]:
        """The norms of the first gradients, the mean of the seeds."""
        norms = [record["gradient_norms"] for record in self.records]
        return [statistics.fmean(one) for one in zip(*norms, strict=True)]

    @property
    def forgetting(self) -> tuple[float, Mean]:
        """What the base gives, and what the adapted model gives."""
        before = self.records[0]["forgetting"][0]
        return before, Mean.of([record["forgetting"][1] for record in self.records])

    def steps_to(self, loss: float) -> int | None:
        """Return the first step at which the mean validation loss was at most this, or None."""
        return next((s for s, one in zip(self.steps, self.curve, strict=True) if one <= loss), None)


@dataclass(frozen=True)
class TaskFindings:
    """The main comparison of one task.

    Args:
        findings: method -> finding, of the finished cells.
        unfinished: the methods that are not.
        diverged: those that did at their best learning rate, with one of the seeds at least.
        costs: method -> costs, where measured.
    """

    findings: Mapping[str, Finding]
    unfinished: tuple[str, ...]
    diverged: tuple[str, ...]
    costs: Mapping[str, Costs]

    @property
    def ranked(self) -> list[str]:
        """The adapter methods, of the lowest test loss first."""
        names = [name for name in self.findings if name != FULL]
        return sorted(names, key=lambda name: self.findings[name].mean("loss").value)

    @property
    def goal(self) -> float:
        """LoRA's final validation loss."""
        return self.findings["lora"].curve[-1]

    @property
    def near_goal(self) -> float:
        """The loss at which 95% of LoRA's fall is done."""
        curve = self.findings["lora"].curve
        return curve[-1] + 0.05 * (curve[0] - curve[-1])

    def seconds_to(self, method: str, loss: float) -> float | None:
        """Return steps to a loss times seconds of a step, or None where one of them is missing."""
        steps = self.findings[method].steps_to(loss)
        if steps is None or method not in self.costs:
            return None
        return steps * self.costs[method].seconds

    def apart(self, one: str, other: str) -> bool:
        """Whether the test losses of two methods differ by more than noise."""
        records = [self.findings[name].records for name in (one, other)]
        return differ(*([record["loss"] for record in found] for found in records))


def differ(one: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether a paired t-test at 95% tells two methods apart.

    Args:
        one: a value for each seed.
        other: those of the other, for the same seeds: they had the same rows in the same order.
    """
    differences = [a - b for a, b in zip(one, other, strict=True)]
    if len(differences) < 2:
        return False
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return abs(statistics.fmean(differences)) > STUDENT_95[len(differences) - 1] * error


def finding(cell: Cell, study: Study, results: Results) -> Finding | None:
    """Return what is known of a cell, or None if it is not finished or diverged at its best."""
    rate, records = _at_best(cell, study, results)
    if len(records) < len(study.seeds) or any(map(_diverged, records)):
        return None
    return Finding(cell, rate, tried(cell, study.seeds[0], results), records)


def _at_best(
    cell: Cell, study: Study, results: Results
) -> tuple[float, tuple[Mapping[str, Any], ...]]:
    """Return the best learning rate, nan while it is searched, and what is there of its runs."""
    rate = best_rate(cell, study, results)
    if rate is None:
        return math.nan, ()
    runs = (Run(cell, rate, seed) for seed in study.seeds)
    return rate, tuple(results[run] for run in runs if run in results)


def _diverged(record: Mapping[str, Any]) -> bool:
    return record.get("loss") is None


def task_findings(
    cells: Sequence[Cell], study: Study, results: Results, measured: Mapping[str, Any] | None
) -> TaskFindings:
    """Return the main comparison of a task.

    Args:
        cells: one for each method.
        study: what was planned.
        results: of the runs that are there.
        measured: the task's entry in the file of costs, if it has one.
    """
    found = {cell.method: finding(cell, study, results) for cell in cells}
    diverged = tuple(
        cell.method for cell in cells if any(map(_diverged, _at_best(cell, study, results)[1]))
    )
    missing = tuple(name for name, one in found.items() if one is None and name not in diverged)
    return TaskFindings(
        findings={name: one for name, one in found.items() if one is not None},
        unfinished=missing,
        diverged=diverged,
        costs={} if measured is None else _costs(measured),
    )


def _costs(measured: Mapping[str, Any]) -> dict[str, Costs]:
    seconds, peaks = measured["seconds"], measured["peak_bytes"]
    return {
        name: Costs(
            seconds=statistics.median(taken),
            ratio=statistics.median(a / b for a, b in zip(taken, seconds["lora"], strict=True)),
            peak_bytes=peaks[name],
        )
        for name, taken in seconds.items()
    }
