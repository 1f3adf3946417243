"""What the results say, as numbers. Nothing here reads or writes a file."""

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

STUDENT_95 = {1: 12.706205, 2: 4.302653, 3: 3.182446, 4: 2.776445}
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
    """The costs of a step.

    Args:
        seconds: the median.
        ratio: the median of seconds / LoRA's seconds, taken round by round.
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
        records: the results of each seed's run.
    """

    cell: Cell
    rate: float
    searched: Mapping[float, float]
    records: tuple[Mapping[str, Any], ...]

    def mean(self, key: str) -> Mean:
        """Return the mean of a number over the runs."""
        return Mean.of([record[key] for record in self.records])

    @property
    def parameters(self) -> int:
        """The number of trained parameters."""
        return int(self.records[0]["parameters"])

    @property
    def steps(self) -> list[int]:
        """The steps at which the validation loss was measured."""
        return list(self.records[0]["steps"])

    @property
    def curve(self) -> list[float]:
        """The validation loss at those steps, the mean over seeds."""
        curves = [record["validation"] for record in self.records]
        return [statistics.fmean(losses) for losses in zip(*curves, strict=True)]

    @property
    def band(self) -> tuple[list[float], list[float]]:
        """The lowest and the highest validation loss of a seed at those steps."""
        losses = list(zip(*(record["validation"] for record in self.records), strict=True))
        return [min(one) for one in losses], [max(one) for one in losses]

    @property
    def early_gradient(self) -> Mean:
        """The mean norm of the first gradients. With a new head of zeros, the first norm is 0."""
        return Mean.of([statistics.fmean(record["gradient_norms"]) for record in self.records])

    @property
    def gradients(self) -> list[float]:
        """The norms of the first gradients, the mean over seeds."""
        norms = [record["gradient_norms"] for record in self.records]
        return [statistics.fmean(one) for one in zip(*norms, strict=True)]

    @property
    def forgetting(self) -> tuple[float, Mean]:
        """The measure of forgetting for the base, and for the adapted model."""
        before = self.records[0]["forgetting"][0]
        return before, Mean.of([record["forgetting"][1] for record in self.records])

    def steps_to(self, loss: float) -> int | None:
        """Return the first step with a mean validation loss of at most `loss`, or None."""
        return next((s for s, one in zip(self.steps, self.curve, strict=True) if one <= loss), None)


@dataclass(frozen=True)
class TaskFindings:
    """The main comparison of one task.

    Args:
        findings: method -> finding, of the finished cells.
        unfinished: methods whose cells are not finished.
        diverged: methods that diverged at their best learning rate, with at least one seed.
        costs: method -> costs, if measured.
    """

    findings: Mapping[str, Finding]
    unfinished: tuple[str, ...]
    diverged: tuple[str, ...]
    costs: Mapping[str, Costs]

    @property
    def ranked(self) -> list[str]:
        """The adapter methods, the lowest test loss first."""
        names = [name for name in self.findings if name != FULL]
        return sorted(names, key=lambda name: self.findings[name].mean("loss").value)

    @property
    def goal(self) -> float:
        """LoRA's final validation loss."""
        return self.findings["lora"].curve[-1]

    @property
    def near_goal(self) -> float:
        """The loss at 95% of LoRA's improvement."""
        curve = self.findings["lora"].curve
        return curve[-1] + 0.05 * (curve[0] - curve[-1])

    def seconds_to(self, method: str, loss: float) -> float | None:
        """Return steps to a loss times seconds of a step, or None if one of them is missing."""
        steps = self.findings[method].steps_to(loss)
        if steps is None or method not in self.costs:
            return None
        return steps * self.costs[method].seconds

    def apart(self, one: str, other: str) -> bool:
        """Whether the test losses of two methods differ beyond noise."""
        records = [self.findings[name].records for name in (one, other)]
        return differ(*([record["loss"] for record in found] for found in records))


def differ(one: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether two methods differ by a paired t-test at 95%.

    Args:
        one: a value for each seed.
        other: values of the other method, for the same seeds, so with the same rows and order.
    """
    differences = [a - b for a, b in zip(one, other, strict=True)]
    if len(differences) < 2:
        return False
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return abs(statistics.fmean(differences)) > STUDENT_95[len(differences) - 1] * error


def finding(cell: Cell, study: Study, results: Results) -> Finding | None:
    """Return the finding of a cell; None if it is not finished, or diverged at its best rate."""
    rate, records = _at_best(cell, study, results)
    if len(records) < len(study.seeds_of(cell)) or any(map(_diverged, records)):
        return None
    return Finding(cell, rate, tried(cell, study.seeds[0], results), records)


def _at_best(
    cell: Cell, study: Study, results: Results
) -> tuple[float, tuple[Mapping[str, Any], ...]]:
    """Return the best learning rate (nan while it is searched) and the results of its runs."""
    rate = best_rate(cell, study, results)
    if rate is None:
        return math.nan, ()
    runs = (Run(cell, rate, seed) for seed in study.seeds_of(cell))
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
        results: of the runs that are done.
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
