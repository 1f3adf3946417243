"""Doing the runs that are missing, several at once; it can be stopped at any time."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

import torch

from benchmarks.convergence.plan import Results, Study, wanted
from benchmarks.convergence.runs import Run, read_runs, write_run
from benchmarks.convergence.training import train

__all__ = ["default_workers", "sweep", "time_left"]

Do = Callable[[Run, Path], None]


def default_workers() -> int:
    """Return one worker a core, each on one thread; one in all where there is a GPU."""
    return 1 if torch.cuda.is_available() else os.cpu_count() or 1


def sweep(
    study: Study,
    folder: Path,
    workers: int,
    *,
    do: Do | None = None,
    say: Callable[[str], None] | None = None,
) -> int:
    """Do every run that the study wants and whose file is not there.

    Args:
        study: what to do.
        folder: of the results; a run's file is there when it is done, and not before.
        workers: processes; 0 does the runs in this one.
        do: in place of `one`, for trials.
        say: where progress goes; to the standard output if not given.

    Returns:
        How many runs it has done.
    """
    do, say, done, started = do or one, say or _print, 0, time.perf_counter()
    pool = _pool(workers) if workers else None
    running: dict[Future[None], Run] = {}
    try:
        results = read_runs(folder)
        while True:
            going = set(running.values())
            missing = [run for run in wanted(study, results) if run not in going]
            if pool is None:
                if not missing:
                    return done
                do(missing[0], folder)
            else:
                for run in missing[: workers - len(running)]:
                    running[pool.submit(do, run, folder)] = run
                if not running:
                    return done
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[future]
                    future.result()
            results, before = read_runs(folder), len(results)
            done += len(results) - before
            say(_progress(study, folder, results, max(1, workers), time.perf_counter() - started))
    finally:
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)


def one(run: Run, folder: Path) -> None:
    """Do one run and write its file."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_run(folder, run, train(run, device))


def _print(line: str) -> None:
    print(line, flush=True)  # into files too, while it goes on


def _pool(workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, initializer=_begin)


def _begin() -> None:
    torch.set_num_threads(1)


def _progress(study: Study, folder: Path, results: Results, workers: int, elapsed: float) -> str:
    latest = max(results, key=lambda run: (folder / run.file).stat().st_mtime)
    loss = results[latest]["validation"][-1]
    left = time_left(study, {run: found["seconds"] for run, found in results.items()}, workers)
    shown = "diverged" if loss is None else f"{loss:.3f}"
    return (
        f"{len(results)} runs done after {elapsed / 60:.0f} min, about {left / 60:.0f} min left; "
        f"{latest.cell.task} {latest.cell.title} {latest.rate:g} seed {latest.seed}: {shown}"
    )


def time_left(study: Study, seconds: dict[Run, float], workers: int) -> float:
    """Return about how many seconds the runs take that are not there.

    A cell is taken to want its learning rates and the other seeds, and a run what others of its
    task took; a task that has none yet, what the slowest took.

    Args:
        study: what is to be done.
        seconds: of each run that is there.
        workers: how many are done at once.
    """
    usual = {
        task: statistics.median(s for run, s in seconds.items() if run.cell.task == task)
        for task in {run.cell.task for run in seconds}
    }
    left = 0.0
    for cell in study.cells:
        there = sum(run.cell == cell for run in seconds)
        whole = len(study.rates[cell.task, cell.method]) + len(study.seeds) - 1
        left += max(0, whole - there) * usual.get(cell.task, max(usual.values(), default=0.0))
    return left / workers
