"""Two runs of `disha finetune` in one output folder: one works, the other says why it does not.

`python -m tests.fuzzing.runs FOLDER TIMES SEED` is a process of its own, which imports
everything once and forks each run.

All runs have the same seed, so the end is always the same, bit for bit: whatever the two do to each
other, no result may differ from that of a run that was alone.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from disha.cli import main
from tests.finetune import tiny_gguf
from tests.finetune.command_line import FILES, arguments, result_of, write_rows

__all__ = ["ORDERS", "meet_runs"]

ORDERS = ("one after the other", "at once", "resumed while one works", "resumed after a kill")
"""How a second run comes upon the first."""

PLAN = {"max_steps": 30, "save_strategy": "steps", "save_steps": 6, "save_total_limit": 2}
WORKERS = {"streaming": True, "dataloader_num_workers": 1}
KILLED = -9
CONTEXT = multiprocessing.get_context("fork")

REFUSALS = {
    0: ("in out: adapter.safetensors",),
    1: ("is in use by another run: process {other} on ",),
    2: ("adapter.safetensors of a finished run", "of an earlier run; continue it with --resume"),
}
"""Exit code -> what one of the printed lines may hold."""


@dataclass(frozen=True)
class Run:
    """A run in a process of its own, which has been started."""

    process: Any
    said: Path

    @classmethod
    def start(cls, words: list[str], said: Path) -> Run:
        """Start a run; what it prints goes to a file."""
        process = CONTEXT.Process(target=_run, args=(words, said))
        process.start()
        return cls(process, said)

    def end(self) -> int:
        """Wait for the end; return the exit code."""
        self.process.join()
        return self.process.exitcode

    def require_reason(self, other: Run) -> None:
        """Check that the exit code and what was printed agree."""
        code = self.end()
        if code == KILLED:
            return
        text = self.said.read_text()
        reasons = [reason.format(other=other.process.pid) for reason in REFUSALS.get(code, ())]
        assert any(reason in text for reason in reasons), (code, other.process.pid, text)
        complaints = [line for line in text.splitlines() if line.startswith("disha:")]
        assert len(complaints) == (code != 0), text


def _run(words: list[str], said: Path) -> None:
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(said.parent)
    torch.set_num_threads(1)
    sys.exit(main(words))


def meet_runs(folder: Path, times: int, seed: int = 0) -> Iterator[str]:
    """Let two runs meet, again and again; yield what came of it.

    Args:
        folder: for everything; empty.
        times: how often; the orders take turns.
        seed: of the moments.

    Raises:
        AssertionError: no run worked, one gave no reason, or a result differs or is missing.
    """
    rng = random.Random(seed)
    model = tiny_gguf.write_gguf(folder / "tiny.gguf", tiny_gguf.random_state(tied=False))
    data = write_rows(folder / "rows.jsonl")
    started = time.monotonic()
    # In this process, so that the runs forked from it find everything imported.
    alone = (
        folder / "alone" / "out"
    )  # as deep as the others, as the adapter notes the way to the base
    with redirect_stdout(io.StringIO()):
        assert main(arguments(model, data, alone, **PLAN)) == 0
    took, expected = time.monotonic() - started, result_of(alone)
    for number in range(times):
        order = ORDERS[number % len(ORDERS)]
        changes = WORKERS if rng.random() < 0.3 else {}
        words = arguments(model, data, Path("out"), **PLAN, **changes)
        place = folder / str(number)
        place.mkdir()
        yield f"{order}: {_meet(order, words, place, rng.uniform(0, took))}"
        assert result_of(place / "out") == expected, order
        left = {path.name for path in (place / "out").iterdir()}
        assert left == FILES | {"checkpoint-24", "checkpoint-30"}, (order, left)


def _meet(order: str, words: list[str], place: Path, pause: float) -> str:
    """Let two runs meet, and let a third finish what no other has; return the exit codes."""
    resuming = [*words, "--resume"]
    first = Run.start(words, place / "first")
    if order == "resumed after a kill":
        time.sleep(pause)
        first.process.kill()
        first.end()
    elif order != "at once":
        time.sleep(pause)
    second = Run.start(resuming if "resumed" in order else words, place / "second")
    codes = [first.end(), second.end()]
    first.require_reason(second)
    second.require_reason(first)
    assert 0 in codes, f"{order}: no run worked"
    if order == "resumed after a kill":
        assert codes[1] == 0, "a killed run still holds the folder"
    return f"exit codes {codes[0]} and {codes[1]}"


if __name__ == "__main__":
    for outcome in meet_runs(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])):
        print(outcome, flush=True)
