"""Trying many files in processes of their own, so that a crash or a hang is one more result."""

from __future__ import annotations

import signal
import tempfile
import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from tests.fuzzing.crafting import LARGE, craft
from tests.fuzzing.limits import Usage, limit_process
from tests.fuzzing.trial import Bench, Results
from tests.processes import FORKED

__all__ = ["Outcome", "try_files"]


@dataclass(frozen=True)
class Outcome:
    """What came of one file.

    Attributes:
        number: its number.
        recipe: what made it.
        size: its size in bytes.
        results: what was tried -> whether it was accepted.
        usage: the most that any of it took.
        failure: what must not have happened, with its stack; empty if all held.
    """

    number: int
    recipe: str
    size: int
    results: Results = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)
    failure: str = ""

    @property
    def accepted(self) -> bool:
        """Whether the file could be loaded into the plain model."""
        return self.results.get("load", False)


def try_files(
    numbers: Iterable[int], *, seed: int = 0, large: int = LARGE, workers: int = 2
) -> Iterator[Outcome]:
    """Craft and try files; yield what came of each, as it comes.

    Args:
        numbers: of the files.
        seed: another gives other files.
        large: how many of something makes a file large.
        workers: how many processes.
    """
    numbers = list(numbers)
    with tempfile.TemporaryDirectory() as folder:
        crews = [
            _Worker(numbers[first::workers], seed, large, Path(folder, str(first)))
            for first in range(workers)
        ]
        try:
            while crews:
                ready = wait([worker.connection for worker in crews])
                for worker in [w for w in crews if w.connection in ready]:
                    outcome = worker.next_outcome()
                    if outcome is None:
                        crews.remove(worker)
                    else:
                        yield outcome
        finally:
            for worker in crews:
                worker.stop()


class _Worker:
    """A process that tries files one after another, and a new one when it dies of one."""

    def __init__(self, numbers: list[int], seed: int, large: int, folder: Path) -> None:
        folder.mkdir()
        self.left, self.seed, self.large, self.folder = numbers, seed, large, folder
        self._start()

    def _start(self) -> None:
        self.connection, theirs = FORKED.Pipe(duplex=False)
        arguments = (theirs, self.left, self.seed, self.large, self.folder)
        self.process = FORKED.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def next_outcome(self) -> Outcome | None:
        """Return an outcome, of a death too; None when all files are done."""
        try:
            outcome: Outcome = self.connection.recv()
        except EOFError:
            self.process.join()
            if not self.left:
                return None
            outcome = self._death()
            self.left = self.left[1:]
            self._start()
            return outcome
        self.left = self.left[1:]
        return outcome

    def _death(self) -> Outcome:
        case = craft(self.left[0], self.seed, self.large)
        code = self.process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        hang = how in ("SIGPROF", "SIGALRM")
        stack = (self.folder / "stacks").read_text(errors="replace")
        failure = f"{'hung' if hang else 'crashed'} ({how})\n{stack}"
        return Outcome(case.number, case.recipe, len(case.data), failure=failure)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def _work(results: Connection, numbers: list[int], seed: int, large: int, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of other base weights, and of what torch means to drop
    with open(folder / "stacks", "w") as stacks:
        bench = Bench(folder)
        bench.try_all(craft(0, seed, large))  # what is made on first use is no file's doing
        limit_process(stacks)
        for number in numbers:
            recipe, size, came = "crafting", 0, dict[str, Any]()
            try:
                case = craft(number, seed, large)
                recipe, size = case.recipe, len(case.data)
                came["results"] = bench.try_all(case)
            except BaseException:
                came["failure"] = traceback.format_exc(limit=-8)
            results.send(Outcome(number, recipe, size, usage=bench.usage, **came))
            if "failure" in came:
                bench = Bench(folder)  # with models that nothing has happened to
