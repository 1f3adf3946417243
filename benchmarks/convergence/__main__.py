"""Train methods on tasks, one run on each core, and add the runs to the file of results.

    python -m benchmarks.convergence                    what the study still lacks
    python -m benchmarks.convergence --task digits --method bone lora
    python -m benchmarks.convergence --task documentation --method lora --r 32 --rates 1e-3

Without `--rates`, the first seed searches the learning rate, and the other seeds run at the best.
It can be stopped at any time: finished runs are kept, and the same command continues.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.convergence.methods import METHODS
from benchmarks.convergence.runs import RESULTS, Cell, read_runs, write_run
from benchmarks.convergence.study import GROUPS, SEEDS, compared, main_cell, missing_runs
from benchmarks.convergence.tasks import EVERY_TASK, TASKS
from benchmarks.convergence.training import train


def main() -> None:
    """Do the runs that the command line asks for, and print each."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convergence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", nargs="+", choices=list(EVERY_TASK), default=list(TASKS))
    parser.add_argument("--method", nargs="+", choices=list(METHODS))
    parser.add_argument("--r", type=int, help="of a MiSS with as many parameters")
    parser.add_argument("--layers", default="all", choices=["all", "attention", "feed-forward"])
    parser.add_argument("--rates", nargs="+", type=float, help="train at these alone")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    workers = os.cpu_count() or 1
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) as pool:
        for cell in _cells(asked):
            _train_missing(cell, asked, pool)
    print(f"nothing is missing in {asked.out}")


def _cells(asked: argparse.Namespace) -> Iterator[Cell]:
    for task in asked.task:
        for method in asked.method or (*compared(task), *GROUPS.get(task, ())):
            cell = replace(main_cell(task, method), layers=asked.layers)
            yield cell if asked.r is None else replace(cell, r=asked.r)


def _train_missing(cell: Cell, asked: argparse.Namespace, pool: Executor) -> None:
    rates = asked.rates or EVERY_TASK[cell.task].rates
    beyond = not asked.rates
    while runs := missing_runs(cell, rates, asked.seeds, beyond, read_runs(asked.out)):
        running = {pool.submit(train, run): run for run in runs}
        for future in as_completed(running):
            run = running[future]
            found = future.result()
            write_run(asked.out, run, found)
            print(f"{run.title}: {found['validation'][-1]}", flush=True)


if __name__ == "__main__":
    main()
