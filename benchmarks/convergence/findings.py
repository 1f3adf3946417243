"""What the results say, as numbers. Nothing here reads or writes a file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from benchmarks.convergence.methods import FULL
from benchmarks.convergence.plan import LONG, Results, Study, best_rate, main_cell
from benchmarks.convergence.runs import Cell, Run

STUDENT_95 = {1: 12.706205, 2: 4.302653, 3: 3.182446, 4: 2.776445}
"""Two-sided 95% quantiles of Student's t by degrees of freedom."""
OTHER = "lora"
STEPS = 400
"""Steps in which the scale goes from 0 to 1, between the scales that were measured."""
Record = Mapping[str, Any]


class Costs(NamedTuple):
    """Of a step: the median of seconds / LoRA's, taken round by round, and bytes allocated."""

    ratio: float
    peak_bytes: int


class Finding(NamedTuple):
    """A finished cell at its best learning rate: the results of each seed's run."""

    cell: Cell
    rate: float
    records: tuple[Record, ...]

    def values(self, key: str) -> list[float]:
        """Return a figure of each seed; of forgetting, that after training."""
        found = [record[key] for record in self.records]
        return [value[1] if key == "forgetting" else value for value in found]

    def mean(self, key: str) -> float:
        """Return the mean of a figure over the seeds."""
        return statistics.fmean(self.values(key))


class TaskFindings(NamedTuple):
    """The main comparison of one task: method -> finding of a finished cell, and its costs."""

    findings: Mapping[str, Finding]
    costs: Mapping[str, Costs]

    @property
    def ranked(self) -> list[str]:
        """The adapter methods, the lowest test loss first."""
        names = [name for name in self.findings if name != FULL]
        return sorted(names, key=lambda name: self.findings[name].mean("loss"))

    def apart(self, one: str, other: str) -> bool:
        """Whether the test losses of two methods differ beyond noise."""
        return differ(*(self.findings[name].values("loss") for name in (one, other)))


def differ(one: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether two methods differ by a paired t-test at 95%."""
    differences = [a - b for a, b in zip(one, other, strict=True)]
    if len(differences) < 2:
        return False
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return abs(statistics.fmean(differences)) > STUDENT_95[len(differences) - 1] * error


def finding(cell: Cell, study: Study, results: Results) -> Finding | None:
    """Return the finding of a cell; None if it is not finished, or diverged at its best rate."""
    rate = best_rate(cell, study, results)
    if rate is None:
        return None
    runs = [Run(cell, rate, seed) for seed in study.seeds_of(cell)]
    records = tuple(results[run] for run in runs if run in results)
    finished = len(records) == len(runs) and all(one.get("loss") is not None for one in records)
    return Finding(cell, rate, records) if finished else None


def task_findings(
    task: str, study: Study, results: Results, measured: Mapping[str, Any] | None
) -> TaskFindings:
    """Return the main comparison of a task."""
    cells = [cell for cell in study.cells if cell == main_cell(task, cell.method)]
    found = {cell.method: finding(cell, study, results) for cell in cells}
    return TaskFindings(
        {name: one for name, one in found.items() if one is not None},
        {} if measured is None else _costs(measured),
    )


def _costs(measured: Mapping[str, Any]) -> dict[str, Costs]:
    seconds, peaks = measured["seconds"], measured["peak_bytes"]
    return {
        name: Costs(
            statistics.median(a / b for a, b in zip(taken, seconds[OTHER], strict=True)),
            peaks[name],
        )
        for name, taken in seconds.items()
    }


# --- ratios to LoRA ------------------------------------------------------------------------------


class Overall(NamedTuple):
    """The geometric mean of a ratio over tasks, with its 95% interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Overall:
        """Return that of the ratios of at least one task, which has no interval."""
        logs = [math.log(value) for value in values]
        mean = statistics.fmean(logs)
        if len(logs) < 2:
            return cls(math.exp(mean), 0.0, math.inf)
        half = STUDENT_95[len(logs) - 1] * statistics.stdev(logs) / math.sqrt(len(logs))
        return cls(*(math.exp(mean + shift) for shift in (0.0, -half, half)))

    @property
    def clear(self) -> bool:
        """Whether 1 is outside the interval, which shows a difference."""
        return not self.low <= 1.0 <= self.high

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{self.value:.2f} (one task)"
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def _of_means(key: str) -> Callable[[TaskFindings, str], float]:
    return lambda found, name: found.findings[name].mean(key) / found.findings[OTHER].mean(key)


RATIOS: Mapping[str, Callable[[TaskFindings, str], float]] = {
    "test loss": _of_means("loss"),
    "time of a step": lambda found, name: found.costs[name].ratio,
    "memory of a step": lambda found, name: (
        found.costs[name].peak_bytes / found.costs[OTHER].peak_bytes
    ),
    "forgetting": _of_means("forgetting"),
}
"""What is compared -> the ratio of a method to LoRA in one task; lower is better."""


def ratios(tasks: Mapping[str, TaskFindings], method: str, what: str) -> dict[str, float]:
    """Return task -> the ratio of a method to LoRA, for each task that has one."""
    has = "costs" if " of a step" in what else "findings"
    both = {task: one for task, one in tasks.items() if {method, OTHER} <= set(getattr(one, has))}
    return {task: RATIOS[what](one, method) for task, one in both.items()}


# --- the longer training -------------------------------------------------------------------------


class Point(NamedTuple):
    """What a trained adapter does at one scale: the test loss, and that on the base's own text."""

    scale: float
    loss: float
    elsewhere: float


class Longer(NamedTuple):
    """The runs of the longer training.

    `records` are method -> rate -> the first seed's results at the main r, `own` the findings at
    each method's own rate, and `sizes` method -> r -> the first seed's test loss there.
    """

    records: Mapping[str, Mapping[float, Record]]
    own: Mapping[str, Finding]
    sizes: Mapping[str, Mapping[int, float]]

    @property
    def rates(self) -> list[float]:
        """All learning rates that were tried."""
        return sorted({rate for tried in self.records.values() for rate in tried})

    @property
    def base(self) -> float:
        """The base's loss on its own text."""
        return float(next(iter(self.own.values())).records[0]["forgetting"][0])

    def loss(self, method: str, rate: float) -> float | None:
        """Return the test loss of a run: inf if it diverged, None if it is missing."""
        record = self.records[method].get(rate)
        if record is None:
            return None
        return math.inf if record.get("loss") is None else float(record["loss"])

    def losses(self, rate: float) -> dict[str, float]:
        """Return method -> test loss at one rate for all, the lowest first."""
        known = ((self.loss(method, rate), method) for method in self.records)
        ranked = sorted((loss, method) for loss, method in known if loss is not None)
        return {method: loss for loss, method in ranked}

    def equal_losses(self, method: str, limit: float) -> list[float]:
        """Return the lowest loss of each seed within a limit of forgetting, at its own rate."""
        return [at_forgetting(points(record), limit) for record in self.own[method].records]


def longer(study: Study, results: Results) -> Longer:
    """Return what the results say of the longer training."""
    seed = study.seeds[0]
    of_long = {run: one for run, one in results.items() if run.cell.task == LONG}
    own = task_findings(LONG, study, results, None).findings
    return Longer(
        records={
            name: {
                run.rate: record
                for run, record in of_long.items()
                if run.cell == main_cell(LONG, name) and run.seed == seed
            }
            for name in own
        },
        own=own,
        sizes={
            name: {
                run.cell.r: record["loss"]
                for run, record in sorted(of_long.items(), key=lambda one: one[0].cell.r)
                if run.cell.method == name and run.rate == own[name].rate and run.seed == seed
            }
            for name in own
        },
    )


def points(record: Record) -> list[Point]:
    """Return the points of one run, with rising scales."""
    return [Point(*point) for point in record["scales"]]


def at_forgetting(curve: Sequence[Point], elsewhere: float) -> float:
    """Return the lowest loss on a curve where the loss elsewhere is at most a limit.

    Between two points, both losses are taken as straight lines.
    """
    found = math.inf
    for one, other in pairwise(curve):
        for step in range(STEPS + 1):
            share = step / STEPS
            if one.elsewhere + share * (other.elsewhere - one.elsewhere) <= elsewhere + 1e-9:
                found = min(found, one.loss + share * (other.loss - one.loss))
    return found
