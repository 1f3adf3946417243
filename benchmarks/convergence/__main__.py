"""`python -m benchmarks.convergence`: do the missing runs of the study, one on each core.

It can be stopped at any time: finished runs are kept, and the same command continues.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

import torch

from benchmarks.convergence.plan import STUDY, wanted
from benchmarks.convergence.runs import RESULTS, Run, read_runs, write_run
from benchmarks.convergence.training import train


def main() -> None:
    """Do the runs, and print each."""
    running: dict[Future[dict[str, Any]], Run] = {}
    workers = os.cpu_count() or 1
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) as pool:
        while True:
            going = set(running.values())
            missing = [run for run in wanted(STUDY, read_runs(RESULTS)) if run not in going]
            for run in missing[: workers - len(running)]:
                running[pool.submit(train, run)] = run
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run, found = running.pop(future), future.result()
                write_run(RESULTS, run, found)
                print(f"{run.title}: {found['validation'][-1]}", flush=True)
    print(f"nothing is missing in {RESULTS}")


if __name__ == "__main__":
    main()
