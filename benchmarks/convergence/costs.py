"""`python -m benchmarks.convergence.costs`: seconds and bytes of a training step of each method.

All methods of a task are measured in one process, in turn, on all cores. The training runs can't
measure this, because they share the machine.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.convergence.methods import adapt
from benchmarks.convergence.plan import compared, main_cell
from benchmarks.convergence.runs import RESULTS
from benchmarks.convergence.tasks import TASKS
from benchmarks.convergence.tasks.task import Task, batch_order
from benchmarks.convergence.training import optimizer_for
from benchmarks.memory import allocated_peak
from benchmarks.protocol import Budget, compare, synchroniser
from benchmarks.results import describe, read_results, write_results

__all__ = ["BUDGET", "COSTS", "costs", "main", "training_step"]

COSTS = RESULTS.with_name("convergence-costs.json")
BUDGET = Budget(120.0, least_rounds=5, most_rounds=40, warm_up=1)
RATE = 1e-5


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the tasks that the file lacks, and write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convergence.costs")
    parser.add_argument("--out", type=Path, default=COSTS, help="the file of costs")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    asked = parser.parse_args(arguments)
    file = asked.out
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = read_results(file) if file.exists() else describe("convergence", device)
    measured = results["tables"].setdefault("costs", [])
    for name in asked.tasks:
        if name not in {one["task"] for one in measured}:
            print(f"{name} ...", flush=True)
            measured.append(costs(TASKS[name], compared(name), BUDGET, device))
            write_results(file, results)
    print(f"costs: {file}")
    return 0


def costs(
    task: Task, methods: Sequence[str], budget: Budget, device: torch.device
) -> dict[str, Any]:
    """Return the seconds of a step in each round, and the most bytes that a step allocates."""
    steps = {name: training_step(task, name, device) for name in methods}
    seconds = compare(steps, budget, synchronise=synchroniser(device))
    peaks = {name: allocated_peak(step, device) for name, step in steps.items()}
    return {"task": task.name, "seconds": seconds, "peak_bytes": peaks}


def training_step(task: Task, method: str, device: torch.device) -> Callable[[], None]:
    """Return a complete step, from forward to optimizer, always with the same batch."""
    model = copy.deepcopy(task.base())
    adapt(model, task.layers["all"], task.head, main_cell(task.name, method))
    model.to(device)
    optimizer, _ = optimizer_for(task, model, RATE)
    rows = task.training_rows()
    indices = batch_order(len(rows), task.batch, 1, seed=0)[0]
    batch = task.batch_of([rows[index] for index in indices], device)

    def step() -> None:
        task.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    sys.exit(main())
