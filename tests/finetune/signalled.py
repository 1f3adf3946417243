"""Runs of the command in processes of their own, each of which sends itself signals."""

from __future__ import annotations

import importlib
import itertools
import os
import random
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf  # noqa: F401 - for the server
import matplotlib.backends.backend_agg  # noqa: F401
import torch
import torch._dynamo

import disha.cli.finetune  # noqa: F401
from disha.cli import main
from disha.finetune import course, stopping
from tests.finetune.command_line import Done
from tests.processes import FORKED

Place = tuple[str, str, int]
"""The module and the name of a function, and the number of the call that a signal comes before."""

LONGEST = 60.0
"""Seconds after which a process hangs."""


def begun(
    words: Sequence[str],
    log: Path,
    number: int = signal.SIGKILL,
    places: Sequence[Place] = (),
    **options: Any,
) -> Any:
    """Begin to run the command in a process, and return the process; the arguments as of `run`."""
    log.mkdir(exist_ok=True)
    process = FORKED.Process(target=_run, args=(words, log, number, places), kwargs=options)
    process.start()
    return process


def run(
    words: Sequence[str],
    log: Path,
    number: int,
    places: Sequence[Place] = (),
    **options: Any,
) -> Done:
    """Run the command until signals end it.

    Args:
        words: its arguments.
        log: a folder for what it prints.
        number: the signal.
        places: where it comes.
        options: those of `_run`.
    """
    process = begun(words, log, number, places, **options)
    process.join(LONGEST)
    is_hanging = process.exitcode is None
    process.kill()
    process.join()
    assert not is_hanging, "the signal was not answered"
    assert process.exitcode is not None
    return Done(process.exitcode, (log / "out").read_text(), (log / "err").read_text())


def stop_often(words: Sequence[str], log: Path, seed: int, calls: tuple[int, int]) -> int:
    """Run the command again and again, until no signal comes before its end.

    Args:
        words: its arguments, among them `--resume`.
        log: a folder for what it prints.
        seed: another gives other moments.
        calls: the least and the most calls of Python between the first step and a signal. If there
            are too few for a step, the runs never come to an end.

    Returns:
        How often it was stopped.
    """
    moments = random.Random(seed)
    for stops in itertools.count():
        number = moments.choice(stopping.SIGNALS)
        done = run(words, log, number, calls=moments.randint(*calls))
        if done.code == 0:
            return stops
        assert done.code == 128 + number, done
        assert "Traceback" not in done.err, done.err
    raise AssertionError("unreachable")


def _run(
    words: Sequence[str],
    log: Path,
    number: int,
    places: Sequence[Place],
    *,
    calls: int = 0,
    before: Mapping[int, Any] | None = None,
    to_group: bool = False,
) -> None:
    """Be the process.

    Args:
        words: the arguments of the command.
        log: the folder for what it prints.
        number: the signal.
        places: where it comes.
        calls: after how many calls of Python since the first step it comes, too; 0 for never.
        before: handlers of signals from the start.
        to_group: send it to the children too.
    """
    os.setpgid(0, 0)
    for name in ("out", "err"):
        stream = open(log / name, "w", buffering=1)  # noqa: SIM115 - open until the end
        os.dup2(stream.fileno(), getattr(sys, f"std{name}").fileno())
        setattr(sys, f"std{name}", stream)
    torch.set_num_threads(1)
    for usual in stopping.SIGNALS:
        signal.signal(usual, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for other, handler in (before or {}).items():
        signal.signal(other, handler)
    # Nothing here takes longer than the time in which two signals are one.
    stopping.TOGETHER = 0.0

    def send() -> None:
        os.kill(0 if to_group else os.getpid(), number)

    for place in places:
        _send_before(place, send)
    if calls:
        _send_after_calls(calls, send)
    sys.argv = ["disha", *words]
    code = main()
    if code > 128:
        # More of them change nothing, until Python has ended.
        assert signal.getsignal(number) == signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    sys.exit(code)


def _send_before(place: Place, send: Callable[[], None]) -> None:
    module, path, call = place
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    right, count = getattr(owner, name), 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            send()
        return right(*arguments, **options)

    setattr(owner, name, counted)


def _send_after_calls(calls: int, send: Callable[[], None]) -> None:
    train, left = course.training_steps, calls

    def count(frame: object, event: str, value: object) -> None:
        nonlocal left
        left -= event == "call"
        if left == 0:
            left = -1
            sys.setprofile(None)
            send()

    def counting(*arguments: Any, **options: Any) -> Any:
        sys.setprofile(count)
        return train(*arguments, **options)

    course.training_steps = counting
