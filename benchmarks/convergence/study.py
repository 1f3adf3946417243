"""What the study compares: the methods of each task, at which learning rates, with which seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.convergence.methods import FULL, SHIRA
from benchmarks.convergence.runs import Cell, Results, Run, tried_rates
from benchmarks.convergence.tasks import EVERY_TASK

SEEDS = 3
RATES = tuple(float(f"{digit}e{power}") for power in range(-7, 2) for digit in (1, 3))
"""The rates of a search beyond those that it begins with, a factor of about three apart."""
LONG = "documentation"
"""The task of the longer training."""
MAIN = ("bone", "tile", "bat", "lora", "rslora", "pissa", "olora", "dora", "loha", FULL)
LONGER = ("bone", "lora", "bat", "rslora", "dora", SHIRA)
GROUPS: Mapping[str, tuple[str, ...]] = {
    "digits": ("groups2", "groups4", "groups_all"),
    "packages": ("groups2", "groups4", "groups_all"),
    "arithmetic": ("groups2", "groups_all"),
    "docstrings": ("groups2", "groups_all"),
    LONG: ("groups3", "groups_all"),
}
"""Task -> the numbers of groups that are tried there. The cheaper a run is, the more of them."""


def compared(task: str) -> tuple[str, ...]:
    """Return the methods of a task's main comparison."""
    return LONGER if task == LONG else MAIN


def main_cell(task: str, method: str) -> Cell:
    """Return the cell of the main comparison."""
    chosen = EVERY_TASK[task]
    r_out = chosen.r_out if method == "tile" else None
    return Cell(task, method, chosen.r, r_out)


def missing_runs(
    cell: Cell, rates: Sequence[float], seeds: int, beyond: bool, results: Results
) -> list[Run]:
    """Return the runs of a cell that come next; none if nothing is missing.

    All seeds run at the rates. If `beyond`, only the first does. It goes on to further rates until
    the best is between two others, and then the other seeds run at the best.
    """
    tried = tried_rates(cell, results)
    if not beyond:
        runs = [Run(cell, rate, seed) for seed in range(seeds) for rate in rates]
        return [run for run in runs if run not in results]
    if len(tried) < len(rates):
        return [Run(cell, rate, 0) for rate in rates if rate not in tried]
    best = min(tried, key=lambda rate: (tried[rate], rate))
    if best == min(tried):
        return [Run(cell, max(rate for rate in RATES if rate < best), 0)]
    if best == max(tried):
        return [Run(cell, min(rate for rate in RATES if rate > best), 0)]
    return [run for run in (Run(cell, best, seed) for seed in range(seeds)) if run not in results]
