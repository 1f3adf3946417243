"""What the results say, as numbers. Nothing here reads or writes a file."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise, takewhile
from typing import Any, NamedTuple

from scipy import stats

from benchmarks.convergence.runs import Cell, Results, Run, best_rate
from benchmarks.convergence.study import GROUPS, LONG, LONGER, SEEDS, compared, main_cell
from benchmarks.convergence.tasks import TASKS

OTHER, KEPT = "lora", "loss on what the base could do"
LIMITS = (0.1, 0.2, 0.3)
"""Of forgetting, at which the methods are compared."""
STEPS = 400
"""Steps in which the scale goes from 0 to 1, between the scales that were measured."""
Record = Mapping[str, Any]


class Finding(NamedTuple):
    """A finished cell at its best learning rate: the results of each seed's run."""

    cell: Cell
    rate: float
    records: tuple[Record, ...]

    def values(self, key: str) -> list[float]:
        """Return a figure of each seed; of forgetting, the loss after training, not its rise."""
        found = [record[key] for record in self.records]
        return [value[1] if key == "forgetting" else value for value in found]

    def mean(self, key: str) -> float:
        """Return the mean of a figure over the seeds."""
        return statistics.fmean(self.values(key))


Finished = Mapping[str, Mapping[str, Finding]]
"""Task -> method -> finding of a finished cell."""


def differ(one: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether two methods differ by a paired t-test at 95%."""
    return len(one) > 1 and bool(stats.ttest_rel(one, other).pvalue < 0.05)


def finding(cell: Cell, results: Results) -> Finding | None:
    """Return the finding of a cell; None if seeds are missing, or diverged at its best rate."""
    rate = best_rate(cell, results)
    if rate is None:
        return None
    records = [results.get(Run(cell, rate, seed), {}) for seed in range(SEEDS)]
    finished = all(one.get("loss") is not None for one in records)
    return Finding(cell, rate, tuple(records)) if finished else None


def _finished(task: str, methods: Iterable[str], results: Results) -> dict[str, Finding]:
    found = {method: finding(main_cell(task, method), results) for method in methods}
    return {name: one for name, one in found.items() if one is not None}


def losses_of_equal_seeds(
    mine: Finding, others: Finding, results: Results
) -> tuple[list[float], list[float]]:
    """Return the test losses of two methods at their best rates, for all seeds that both have."""
    pairs = []
    for seed in itertools.count():
        runs = [Run(one.cell, one.rate, seed) for one in (mine, others)]
        if any(run not in results for run in runs):
            break
        pairs.append([results[run]["loss"] for run in runs])
    return [first for first, _ in pairs], [second for _, second in pairs]


def main_findings(results: Results) -> Finished:
    """Return the findings of the main comparison."""
    return {task: _finished(task, compared(task), results) for task in TASKS}


def with_groups(results: Results) -> Finished:
    """Return the findings of groups of shards, and of what they are compared with."""
    return {
        task: _finished(task, ("bone", "bat", OTHER, *names), results)
        for task, names in GROUPS.items()
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
        error = statistics.stdev(logs) / math.sqrt(len(logs))
        half = float(stats.t.ppf(0.975, len(logs) - 1)) * error
        return cls(math.exp(mean), math.exp(mean - half), math.exp(mean + half))

    @property
    def clear(self) -> bool:
        """Whether 1 is outside the interval, which shows a difference."""
        return not self.low <= 1.0 <= self.high

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{self.value:.2f} (one task)"
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


RATIOS = {"test loss": "loss", KEPT: "forgetting"}
"""What is compared -> its figure in a finding; lower is better."""


def ratios(tasks: Finished, method: str, what: str) -> dict[str, float]:
    """Return task -> the ratio of a method to LoRA, for each task that has both."""
    key = RATIOS[what]
    return {
        task: found[method].mean(key) / found[OTHER].mean(key)
        for task, found in tasks.items()
        if {method, OTHER} <= found.keys()
    }


# --- the longer training -------------------------------------------------------------------------


class Point(NamedTuple):
    """What a trained adapter does at one scale: its test loss, and how much it forgets.

    Forgetting is the rise of the loss on text that the base itself wrote.
    """

    scale: float
    loss: float
    forgetting: float


class Longer(NamedTuple):
    """The runs of the longer training.

    `records` are method -> rate -> results of each seed, without runs that diverged, and `own` the
    findings at the rate of each method that has all seeds.
    """

    records: Mapping[str, Mapping[float, tuple[Record, ...]]]
    own: Mapping[str, Finding]

    @property
    def rates(self) -> list[float]:
        """The learning rates at which MiSS ran."""
        return sorted(self.records["bone"])

    def ends(self, method: str, rate: float) -> list[Point]:
        """Return what each seed's run does as it was trained; nothing if there is none."""
        return [points(record)[-1] for record in self.records[method].get(rate, ())]

    def has_all(self, method: str, rate: float) -> bool:
        """Whether every seed has run at a rate."""
        return len(self.ends(method, rate)) == SEEDS

    def mean(self, method: str, rate: float) -> Point:
        """Return the mean over the seeds if all have run at a rate, or else the first seed's."""
        ends = self.ends(method, rate)[: None if self.has_all(method, rate) else 1]
        return Point(*map(statistics.fmean, zip(*ends, strict=True)))

    def at(self, method: str, forgetting: float) -> tuple[float, float]:
        """Return the lowest loss within a limit of forgetting, and its rate, at any scale."""
        return min(
            (statistics.fmean(self.within(method, rate, forgetting)), rate)
            for rate in self.records[method]
        )

    def within(self, method: str, rate: float, forgetting: float) -> list[float]:
        """Return the lowest loss of each seed within that limit, if all have run, or the first."""
        records = self.records[method][rate][: None if self.has_all(method, rate) else 1]
        return [at_forgetting(points(record), forgetting) for record in records]


def longer(results: Results) -> Longer:
    """Return what the results say of the longer training."""
    names = (*LONGER, *GROUPS[LONG])
    of_each = {name: _of_each_rate(main_cell(LONG, name), results) for name in names}
    own = _finished(LONG, names, results)
    return Longer({name: found for name, found in of_each.items() if found}, own)


def _of_each_rate(cell: Cell, results: Results) -> dict[float, tuple[Record, ...]]:
    """Return rate -> the results of the first seeds, as far as there are any that learned."""
    found: dict[float, tuple[Record, ...]] = {}
    for rate in sorted({run.rate for run in results if run.cell == cell}):
        records = [results.get(Run(cell, rate, seed), {}) for seed in range(SEEDS)]
        learned = tuple(takewhile(_has_learned, records))
        if learned:
            found[rate] = learned
    return found


def _has_learned(record: Record) -> bool:
    """Return whether a run ended with a lower validation loss than it began with."""
    return record.get("loss") is not None and record["validation"][-1] < record["validation"][0]


def points(record: Record) -> list[Point]:
    """Return the points of one run, with rising scales."""
    base = record["forgetting"][0]
    return [Point(scale, loss, elsewhere - base) for scale, loss, elsewhere in record["scales"]]


def at_forgetting(curve: Sequence[Point], limit: float) -> float:
    """Return the lowest loss on a curve where forgetting is at most a limit.

    Between two points, both are taken as straight lines.
    """
    found = math.inf
    for one, other in pairwise(curve):
        for step in range(STEPS + 1):
            share = step / STEPS
            if one.forgetting + share * (other.forgetting - one.forgetting) <= limit + 1e-9:
                found = min(found, one.loss + share * (other.loss - one.loss))
    return found
