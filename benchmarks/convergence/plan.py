"""Which runs the study needs next, given the results so far."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.convergence.groups import GROUPS
from benchmarks.convergence.methods import (
    FULL,
    GOLAY,
    GRALORA,
    IDENTITY,
    MATRICES,
    METHODS,
    OFT,
    SHIRA,
)
from benchmarks.convergence.runs import Cell, Run
from benchmarks.convergence.tasks import TASKS

Results = Mapping[Run, Mapping[str, Any]]

RATES = tuple(float(f"{digit}e{power}") for power in range(-7, 2) for digit in (1, 3))
"""All learning rates are among these, a factor of about three apart."""
MOST_EXTENSIONS = 4
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Study:
    """What is compared, and with which learning rates each search begins.

    The first seed searches the learning rate. A cell with a leader takes its best rate, and has
    the first seed only. `repeated` are further runs: cell and rate -> how many seeds.
    """

    cells: tuple[Cell, ...]
    rates: Mapping[tuple[str, str], tuple[float, ...]]
    seeds: tuple[int, ...] = SEEDS
    leaders: Mapping[Cell, Cell] = field(default_factory=dict)
    repeated: Mapping[tuple[Cell, float], int] = field(default_factory=dict)

    def seeds_of(self, cell: Cell) -> tuple[int, ...]:
        """Return the seeds of a cell's final runs."""
        return self.seeds[:1] if cell in self.leaders else self.seeds


def final_loss(record: Mapping[str, Any]) -> float:
    """Return the last validation loss, which chooses the learning rate; inf if it diverged."""
    last = record["validation"][-1]
    return math.inf if last is None else float(last)


def tried(cell: Cell, seed: int, results: Results) -> dict[float, float]:
    """Return learning rate -> final validation loss, for the runs of one seed."""
    return {
        run.rate: final_loss(record)
        for run, record in results.items()
        if run.cell == cell and run.seed == seed
    }


def best_rate(cell: Cell, study: Study, results: Results) -> float | None:
    """Return the learning rate that a finished search has found, or None before that."""
    cell = study.leaders.get(cell, cell)
    return None if _search(cell, study, results) else _best(cell, study, results)


def wanted(study: Study, results: Results) -> list[Run]:
    """Return the missing runs that are known to be needed so far, in order.

    First come the learning rates of every cell. If the best is at an edge, the next one beyond it
    follows. Then comes every other seed, for all cells at their best and their repeated rates.
    """
    searches, repeats = [], []
    for cell in study.cells:
        searched = [] if cell in study.leaders else _search(cell, study, results)
        searches += searched
        if not searched and (rate := best_rate(cell, study, results)) is not None:
            runs = [Run(cell, rate, seed) for seed in study.seeds_of(cell)]
            searches += [run for run in runs[:1] if run not in results]
            repeats += [run for run in runs[1:] if run not in results]
    for (cell, rate), count in study.repeated.items():
        runs = [Run(cell, rate, seed) for seed in range(count)]
        repeats += [run for run in runs if run not in (*results, *searches, *repeats)]
    return searches + sorted(repeats, key=lambda run: run.seed)


def _best(cell: Cell, study: Study, results: Results) -> float:
    found = tried(cell, study.seeds[0], results)
    return min(found, key=lambda rate: (found[rate], rate))


def _search(cell: Cell, study: Study, results: Results) -> list[Run]:
    """Return the runs that the search for a cell's learning rate needs next; none if it is done."""
    seed, start = study.seeds[0], study.rates[cell.task, cell.method]
    found = tried(cell, seed, results)
    missing = [Run(cell, rate, seed) for rate in start if rate not in found]
    if missing or len(start) == 1:
        return missing
    best, extended = _best(cell, study, results), len(found) - len(start)
    if extended >= MOST_EXTENSIONS or min(found) < best < max(found):
        return []
    lower, higher = ([rate for rate in RATES if rate < best], [r for r in RATES if r > best])
    return [Run(cell, lower[-1] if best == min(found) else higher[0], seed)]


# --- the study -----------------------------------------------------------------------------------


def main_cell(task: str, method: str) -> Cell:
    """Return the cell of the main comparison."""
    chosen = TASKS[task]
    r_out = chosen.r_out if method == "tile" else None
    return Cell(task, method, chosen.r, r_out)


def _grid(lowest: float, count: int = 4) -> tuple[float, ...]:
    first = RATES.index(lowest)
    return RATES[first : first + count]


LOWEST: Mapping[str, Mapping[str, float]] = {
    # The lowest rate with which the search begins, by task and method.
    "digits": {"bone": 1e-3, "tile": 1e-3, "bat": 1e-3, FULL: 3e-4, "": 3e-3},
    "packages": {"bone": 3e-4, "tile": 3e-4, "bat": 3e-4, FULL: 3e-5, "": 1e-3},
    "arithmetic": {"bone": 1e-4, "tile": 1e-4, "bat": 1e-4, FULL: 1e-5, "": 3e-4},
    "docstrings": {"bone": 1e-4, "tile": 1e-4, "bat": 1e-4, FULL: 1e-5, "": 3e-4},
}
LONG = "documentation"
"""The task of the longer study."""
GRID = (2e-5, 1e-4, 3e-4, 1e-3)
"""One grid for all methods there begins with the paper's rate for all, and peft's."""
LONGER = ("bone", "lora", "bat", "rslora", "dora", IDENTITY, SHIRA)
MILD = {"bone": 3e-4, "lora": 1e-3, "bat": 1e-4, "rslora": 3e-4, IDENTITY: 3e-4, SHIRA: 1e-3}
"""A rate of each method at which they forget about as much: every seed runs there."""
RANKS = (8, 32, 128)


def compared(task: str) -> tuple[str, ...]:
    """Return the methods of a task's main comparison, in the order in which they are run."""
    elsewhere = (IDENTITY, SHIRA, GOLAY, GRALORA, OFT, *MATRICES, *GROUPS)
    return LONGER if task == LONG else tuple(name for name in METHODS if name not in elsewhere)


def _rates(tasks: Iterable[str]) -> dict[tuple[str, str], tuple[float, ...]]:
    return {
        (task, method): GRID if task == LONG else _grid(LOWEST[task].get(method, LOWEST[task][""]))
        for task in tasks
        for method in compared(task)
    }


SIZED = ("bone", "bat", "lora")


def _sizes(task: str, shares: Iterable[float]) -> list[Cell]:
    sizes = [round(share * TASKS[task].r) for share in shares]
    return [Cell(task, method, r) for r in sizes for method in SIZED]


def _parts(task: str) -> list[Cell]:
    parts = [part for part in TASKS[task].layers if part != "all"]
    return [Cell(task, name, TASKS[task].r, layers=part) for part in parts for name in SIZED]


def _ranks() -> dict[Cell, Cell]:
    """Return the cells of other r in the longer study, each with the one that chooses its rate."""
    return {
        Cell(LONG, method, r): main_cell(LONG, method) for r in RANKS for method in ("bone", "lora")
    }


MATRIX_SEEDS: Mapping[tuple[str, float], int] = {
    ("digits", 3e-3): 8,
    ("digits", 1e-3): 3,
    ("packages", 1e-3): 3,
    ("docstrings", 3e-4): 3,
    (LONG, 3e-4): 1,
}
"""Where other fixed matrices are compared: task and rate -> seeds. The first rate is the best."""


def _fixed() -> dict[Cell, float]:
    """Return the cell of each fixed matrix and task, with Bone's best rate."""
    best = dict(reversed(MATRIX_SEEDS))
    return {main_cell(task, name): best[task] for task in best for name in MATRICES}


SIGNS = ("signs", GOLAY)
CANDIDATES: Mapping[str, tuple[str, ...]] = {
    "digits": (
        *("groups2", "groups4", "groups_all", "groups4_contiguous", "bat_groups4"),
        "groups_all_contiguous",
        *SIGNS,
        SHIRA,
        GRALORA,
        OFT,
    ),
    "packages": ("groups2", "groups4", "groups_all", "groups4_contiguous", *SIGNS, GRALORA, OFT),
    "arithmetic": ("groups2", "groups4", "groups_all"),
    "docstrings": ("groups2", "groups4", "groups_all"),
    LONG: ("groups3", "groups_all", "groups3_contiguous", "groups_all_contiguous"),
}
"""Task -> what is tried there in place of MiSS. The cheaper a run is, the more is tried."""
FIRST_RATES: Mapping[str, tuple[float, ...]] = {
    "digits": _grid(1e-3),
    "packages": _grid(1e-3, 3),
    "arithmetic": _grid(3e-4, 3),
    "docstrings": _grid(3e-4, 3),
    LONG: (1e-3,),
}
"""The first rates of a candidate's search. In the longer study a run takes half an hour, and there
is no search: candidates have LoRA's mild rate, which was chosen before."""
LONG_RATES = _grid(3e-4, 3)
"""Rates at which groups run in the longer study: one seed each, to see which is the best."""


MORE_SEEDS: Mapping[tuple[str, str, float], int] = {
    ("digits", "groups2", 1e-2): 8,
    ("digits", "groups4", 3e-2): 8,
    ("digits", "groups_all", 3e-2): 8,
    ("digits", "lora", 1e-2): 8,
    ("docstrings", "bone", 3e-4): 8,
    ("docstrings", "groups_all", 3e-3): 8,
    ("docstrings", "lora", 3e-3): 8,
}
"""Task, method and its best rate -> seeds, where three do not tell groups from MiSS or LoRA."""


def _candidates() -> dict[Cell, tuple[float, ...]]:
    """Return the cell of each candidate and task, with its first rates."""
    return {
        main_cell(task, name): FIRST_RATES[task]
        for task, names in CANDIDATES.items()
        for name in names
    }


STUDY = Study(
    cells=(
        *(main_cell(task, method) for task in TASKS for method in compared(task)),
        # All ablations where a run takes seconds. Only one, half of r, where it takes a minute.
        *_sizes("digits", (0.5, 2, 4)),
        *_parts("digits"),
        *(Cell("digits", "tile", TASKS["digits"].r, r_out) for r_out in (16, 64)),
        *(Cell("digits", name, TASKS["digits"].r, dtype="bfloat16") for name in ("bone", "bat")),
        *_sizes("packages", (0.5,)),
        *_ranks(),
        *(cell for cell in _fixed() if cell not in _candidates()),
        *_candidates(),
    ),
    rates={
        **_rates(TASKS),
        **{(cell.task, cell.method): (rate,) for cell, rate in _fixed().items()},
        **{(cell.task, cell.method): rates for cell, rates in _candidates().items()},
    },
    leaders=_ranks(),
    repeated={
        **{
            (main_cell(task, name), rate): count
            for (task, rate), count in MATRIX_SEEDS.items()
            for name in ("bone", *MATRICES)
        },
        **{(main_cell(LONG, name), rate): len(SEEDS) for name, rate in MILD.items()},
        **{
            (main_cell(task, name), rate): count for (task, name, rate), count in MORE_SEEDS.items()
        },
        **{
            (main_cell(LONG, name), rate): 1
            for name in ("groups3", "groups_all")
            for rate in LONG_RATES
        },
    },
)
