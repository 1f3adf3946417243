"""A cell of the study, a run of it, and the file of what the run found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import rounded, write_whole

__all__ = ["RESULTS", "Cell", "Run", "read_runs", "write_json", "write_run"]

DIGITS = 6
"""Significant digits that are written: fewer would round seeds to the same value."""
RESULTS = Path(__file__).parent.parent / "results" / "convergence"


@dataclass(frozen=True)
class Cell:
    """What is compared: a method on a task, at one size.

    Args:
        task: its name.
        method: its name.
        r: the r of Bone that has as many parameters; for Bone and BAT it is their own.
        r_out: the tile's, or None.
        layers: which of the task's layers.
        dtype: of the adapter's blocks.
    """

    task: str
    method: str
    r: int
    r_out: int | None = None
    layers: str = "all"
    dtype: str = "float32"

    @property
    def title(self) -> str:
        """The cell's name in files."""
        tile = "" if self.r_out is None else f"x{self.r_out}"
        more = [part for part in (self.layers, self.dtype) if part not in ("all", "float32")]
        return "-".join([self.method, f"r{self.r}{tile}", *more])


@dataclass(frozen=True)
class Run:
    """One training of a cell.

    Args:
        cell: what is trained.
        rate: the peak learning rate.
        seed: of the order of rows and of the adapter's random initial values.
    """

    cell: Cell
    rate: float
    seed: int

    @property
    def file(self) -> str:
        """Where its results are, from the folder of results."""
        return f"{self.cell.task}/{self.cell.title}/rate{self.rate:g}-seed{self.seed}.json"


def read_runs(folder: Path) -> dict[Run, dict[str, Any]]:
    """Return what each run found, of the runs whose files are there.

    Args:
        folder: of the results.

    Raises:
        ValueError: a file is not where the run in it belongs.
    """
    found = {}
    for path in sorted(folder.glob("*/*/*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        run = Run(Cell(**record["cell"]), record["rate"], record["seed"])
        if folder / run.file != path:
            raise ValueError(f"{path} holds the results of {run.file}; delete it, it is made anew")
        found[run] = record
    return found


def write_run(folder: Path, run: Run, found: Mapping[str, Any]) -> None:
    """Write what a run found.

    Args:
        folder: of the results.
        run: the run.
        found: numbers and lists of them; None where a number is not finite.
    """
    write_json(folder / run.file, {**asdict(run), **found})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a file whole or not at all, a line for each key."""
    lines = [
        f"{json.dumps(key)}: {json.dumps(rounded(one, DIGITS), allow_nan=False)}"
        for key, one in value.items()
    ]
    write_whole(path, "{\n " + ",\n ".join(lines) + "\n}\n")
