"""Do the missing runs, several at once. It can be stopped at any time."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from benchmarks.convergence.plan import Results, Study, wanted
from benchmarks.convergence.runs import Run, read_runs, write_run
from benchmarks.convergence.training import train

__all__ = ["default_workers", "sweep", "time_left"]

Train = Callable[[Run], Mapping[str, Any]]


def default_workers() -> int:
    """Return one worker per core, each with one thread; one worker if there is a GPU."""
    return 1 if torch.cuda.is_available() else os.cpu_count() or 1


def sweep(
    study: Study,
    file: Path,
    workers: int,
    *,
    train_one: Train | None = None,
    say: Callable[[str], None] | None = None,
) -> int:
    """Do every run that the study wants and the file lacks."""
    train_one, say, started = train_one or _train, say or _print, time.perf_counter()
    pool = _pool(workers) if workers else None
    running: dict[Future[Mapping[str, Any]], Run] = {}
    results, done = read_runs(file), 0
    try:
        while True:
            going = set(running.values())
            missing = [run for run in wanted(study, results) if run not in going]
            if pool is None:
                ended = {run: train_one(run) for run in missing[:1]}
            else:
                for run in missing[: workers - len(running)]:
                    running[pool.submit(train_one, run)] = run
                futures = wait(running, return_when=FIRST_COMPLETED).done
                ended = {running.pop(future): future.result() for future in futures}
            if not ended:
                return done
            for run, found in ended.items():
                write_run(file, run, found)
                done += 1
                results = read_runs(file)
                elapsed = time.perf_counter() - started
                say(_progress(study, run, results, max(1, workers), elapsed))
    finally:
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)


def _train(run: Run) -> Mapping[str, Any]:
    return train(run, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _print(line: str) -> None:
    print(line, flush=True)  # at once, also into a file


def _pool(workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, initializer=_begin)


def _begin() -> None:
    torch.set_num_threads(1)


def _progress(study: Study, latest: Run, results: Results, workers: int, elapsed: float) -> str:
    loss = results[latest]["validation"][-1]
    left = time_left(study, {run: found["seconds"] for run, found in results.items()}, workers)
    shown = "diverged" if loss is None else f"{loss:.3f}"
    return (
        f"{len(results)} runs done after {elapsed / 60:.0f} min, about {left / 60:.0f} min left; "
        f"{latest.cell.task} {latest.cell.title} {latest.rate:g} seed {latest.seed}: {shown}"
    )


def time_left(study: Study, seconds: dict[Run, float], workers: int) -> float:
    """Estimate the seconds that the missing runs take.

    It assumes that a cell needs its first learning rates and the other seeds, and that a run takes
    as long as others of its task. A task without runs counts like the slowest task.
    """
    usual = {
        task: statistics.median(s for run, s in seconds.items() if run.cell.task == task)
        for task in {run.cell.task for run in seconds}
    }
    left = 0.0
    for cell in study.cells:
        there = sum(run.cell == cell for run in seconds)
        left += max(0, study.least_runs(cell) - there) * usual.get(
            cell.task, max(usual.values(), default=0.0)
        )
    return left / workers
