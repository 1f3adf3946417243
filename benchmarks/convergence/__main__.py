"""`python -m benchmarks.convergence`: do the missing runs of the study."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.convergence.plan import STUDY
from benchmarks.convergence.runs import RESULTS
from benchmarks.convergence.sweep import default_workers, sweep
from benchmarks.convergence.tasks import TASKS

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the runs, and print the progress."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convergence", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file of results")
    parser.add_argument("--workers", type=int, default=default_workers(), help="runs at once")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), help="these only")
    asked = parser.parse_args(arguments)
    cells = tuple(c for c in STUDY.cells if asked.tasks is None or c.task in asked.tasks)
    try:
        done = sweep(replace(STUDY, cells=cells), asked.results, asked.workers)
    except KeyboardInterrupt:
        print("stopped; finished runs are kept, and the same command continues")
        return 130
    print(f"{done} runs done; nothing is missing in {asked.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
