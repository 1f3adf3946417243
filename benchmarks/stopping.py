"""`python -m benchmarks.stopping`: the time from a signal to a saved checkpoint.

`disha finetune --demo` gets the signal in the middle of a step, and in the middle of an evaluation.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.markdown import table

__all__ = ["MOMENTS", "main"]


class Moment(NamedTuple):
    """When a signal comes.

    Attributes:
        flags: of the run, after `--demo`.
        steps: how many steps are done before.
        share: how long after the last of these steps, as a part of the time that it took.
    """

    flags: Sequence[str]
    steps: int
    share: float


MOMENTS: Mapping[str, Moment] = {
    "in a step": Moment([], 3, 0.5),
    "in a step of 8 batches": Moment(["--gradient_accumulation_steps", "8"], 2, 0.5),
    "in an evaluation": Moment(["--eval_steps", "4"], 3, 1.5),
}


class Stop(NamedTuple):
    """What came of a signal: seconds to a checkpoint and to the end, and the exit code."""

    saved: float
    ended: float
    code: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure each moment, and print a table.

    Args:
        arguments: of the command line; the process's by default.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stopping", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="signals per moment")
    parser.add_argument("--only", nargs="+", choices=list(MOMENTS), default=list(MOMENTS))
    parser.add_argument("--signal", default="SIGTERM", help="its name")
    asked = parser.parse_args(arguments)
    number = signal.Signals[asked.signal]
    rows = []
    for name in asked.only:
        stops = [stop(MOMENTS[name], number) for _ in range(asked.rounds)]
        saved, ended = ([getattr(one, field) for one in stops] for field in ("saved", "ended"))
        codes = sorted({str(one.code) for one in stops})
        rows.append([name, *_seconds(saved), *_seconds(ended), ", ".join(codes)])
    print(
        f"{number.name}, {asked.rounds} times each, {os.cpu_count()} cores, load average "
        f"{os.getloadavg()[0]:.1f}, torch {torch.__version__}\n"
    )
    header = ["", "saved, median", "most", "ended, median", "most", "exit code"]
    print(table(header, rows), end="")
    return 0


def _seconds(values: Sequence[float]) -> list[str]:
    return [f"{one:.2f} s" for one in (statistics.median(values), max(values))]


def stop(moment: Moment, number: int) -> Stop:
    """Start the demo, send it a signal at a moment, and measure what follows."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "out")
        command = [sys.executable, "-m", "disha", "finetune", "--demo", "--output_dir", str(output)]
        process = subprocess.Popen([*command, *moment.flags], stdout=subprocess.DEVNULL)
        try:
            seconds = _step_seconds(process, output / "metrics.jsonl", moment.steps)
            time.sleep(moment.share * seconds)
            started = time.perf_counter()
            process.send_signal(number)
            while not (found := list(output.glob("checkpoint-*"))) and process.poll() is None:
                time.sleep(0.005)
            saved = time.perf_counter() - started if found else float("nan")
            code = process.wait()
            return Stop(saved, time.perf_counter() - started, code)
        finally:
            process.kill()
            process.wait()


def _step_seconds(process: subprocess.Popen[Any], metrics: Path, steps: int) -> float:
    """Wait for some steps, and return how long the last one took."""
    while True:
        if process.poll() is not None:
            raise RuntimeError(f"the run has ended before step {steps}")
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        if len(lines) > steps:
            last, before = json.loads(lines[-1]), json.loads(lines[-2])
            return float(last["seconds"] - before.get("seconds", 0.0))
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main())
