"""Do the missing runs, several at once. It can be stopped at any time."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from benchmarks.convergence.plan import Results, Study, wanted
from benchmarks.convergence.runs import Run, read_runs, write_run
from benchmarks.convergence.training import train

__all__ = ["default_workers", "sweep"]

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
                say(_progress(run, results, elapsed))
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


def _progress(latest: Run, results: Results, elapsed: float) -> str:
    loss = results[latest]["validation"][-1]
    shown = "diverged" if loss is None else f"{loss:.3f}"
    return (
        f"{len(results)} runs done after {elapsed / 60:.0f} min; "
        f"{latest.cell.task} {latest.cell.title} {latest.rate:g} seed {latest.seed}: {shown}"
    )
