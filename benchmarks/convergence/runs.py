"""A cell of the study, a run of it, and the file with the results of all runs.

The file has one line of JSON for each run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import rounded, write_whole

DIGITS = 6
"""Significant digits in the file. With fewer, two seeds could round to the same value."""
RESULTS = Path(__file__).parent.parent / "results" / "convergence.jsonl"


@dataclass(frozen=True)
class Cell:
    """A method on a task. `r` is that of a Bone with as many parameters."""

    task: str
    method: str
    r: int
    r_out: int | None = None
    layers: str = "all"

    @property
    def title(self) -> str:
        """The cell's name, without its task."""
        tile = "" if self.r_out is None else f"x{self.r_out}"
        part = "" if self.layers == "all" else f"-{self.layers}"
        return f"{self.method}-r{self.r}{tile}{part}"


@dataclass(frozen=True)
class Run:
    """One training of a cell, at a peak learning rate. The seed is of rows and initial values."""

    cell: Cell
    rate: float
    seed: int

    @property
    def title(self) -> str:
        """The run's name, by which the file of results is sorted."""
        return f"{self.cell.task}/{self.cell.title}/rate{self.rate:g}-seed{self.seed}"


Results = Mapping[Run, Mapping[str, Any]]


def read_runs(file: Path) -> dict[Run, dict[str, Any]]:
    """Return the results of each run, in the order of their titles."""
    if not file.exists():
        return {}
    records = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return {Run(Cell(**one["cell"]), one["rate"], one["seed"]): one for one in records}


def write_run(file: Path, run: Run, found: Mapping[str, Any]) -> None:
    """Add the results of a run to the file, or replace those that it has.

    The file is written anew as a whole, so stopping the process never leaves half a line.
    """
    records = {**read_runs(file), run: {**asdict(run), **found}}
    lines = [
        json.dumps(rounded(records[one], DIGITS), allow_nan=False)
        for one in sorted(records, key=lambda one: one.title)
    ]
    write_whole(file, "\n".join(lines) + "\n")


def tried_rates(cell: Cell, results: Results) -> dict[float, float]:
    """Return learning rate -> last validation loss of the first seed; inf if it diverged."""
    found = {}
    for run, record in results.items():
        if run.cell == cell and run.seed == 0:
            last = record["validation"][-1]
            found[run.rate] = math.inf if last is None else float(last)
    return found


def best_rate(cell: Cell, results: Results) -> float | None:
    """Return the rate with the lowest validation loss; None if no run is there."""
    tried = tried_rates(cell, results)
    return min(tried, key=lambda rate: (tried[rate], rate), default=None)
