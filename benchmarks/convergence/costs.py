"""`python -m benchmarks.convergence.costs`: seconds and bytes of a training step of each method.

All methods of a task are measured in one process, in turn, on all cores. The training runs can't
measure this, because they share the machine.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.convergence.methods import adapt
from benchmarks.convergence.runs import RESULTS
from benchmarks.convergence.study import compared, main_cell
from benchmarks.convergence.tasks import TASKS
from benchmarks.convergence.tasks.task import Task, batch_order
from benchmarks.convergence.training import optimizer_for
from benchmarks.memory import allocated_peak
from benchmarks.protocol import Budget, compare
from benchmarks.results import describe, read_results, write_results
from benchmarks.steps import full_step

COSTS = RESULTS.with_name("convergence-costs.json")
BUDGET = Budget(120.0, least_rounds=5, most_rounds=40, warm_up=1)
CPU = torch.device("cpu")
RATE = 1e-5


def main() -> None:
    """Measure the tasks that the file lacks, and write it."""
    results = read_results(COSTS) if COSTS.exists() else describe(CPU)
    measured = results["tables"].setdefault("costs", [])
    for name, task in TASKS.items():
        if name not in {one["task"] for one in measured}:
            print(f"{name} ...", flush=True)
            measured.append(costs(task))
            write_results(COSTS, results)
    print(f"nothing is missing in {COSTS}")


def costs(task: Task) -> dict[str, Any]:
    """Return the seconds of a step in each round, and the most bytes that a step allocates."""
    steps = {name: training_step(task, name) for name in compared(task.name)}
    seconds = compare(steps, BUDGET)
    peaks = {name: allocated_peak(step, CPU) for name, step in steps.items()}
    return {"task": task.name, "seconds": seconds, "peak_bytes": peaks}


def training_step(task: Task, method: str) -> Callable[[], None]:
    """Return a complete step, from forward to optimizer, always with the same batch."""
    model = copy.deepcopy(task.base())
    adapt(model, task.layers["all"], task.head, main_cell(task.name, method))
    optimizer, _ = optimizer_for(task, model, RATE)
    rows = task.rows.training
    batch = task.batch_of([rows[i] for i in batch_order(len(rows), task.batch, 1, seed=0)[0]])
    return full_step(lambda: task.loss(model, batch), optimizer)


if __name__ == "__main__":
    main()
