"""Signals that ask the process to stop, such as Ctrl-C.

A signal raises `Interrupted`, wherever the process is. If that would leave something half done,
a signal is only noted, and raises later. A second signal ends the process at once.

Python runs the handler of a signal between two of its own instructions, in the main thread. So an
operation of PyTorch that is under way is finished first.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

__all__ = [
    "SIGNALS",
    "Interrupted",
    "forget_signal",
    "listening",
    "noted_signal",
    "raising",
    "wait_for_first",
]

SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)  # Windows has fewer
)
"""Ctrl-C, a request to end, a closed terminal, and the warnings that schedulers send."""

USUAL = (signal.SIG_DFL, signal.default_int_handler)
"""Handlers to replace. A signal that is ignored stays ignored, as under nohup, and a handler of the
program that calls this one stays too."""

TOGETHER = 1.0
"""Seconds in which several signals count as one. Under torchrun, one Ctrl-C sends two signals: one
from the terminal, and one from torchrun. A terminal that is closed may send two as well."""

LONGEST_WAIT = 10.0
"""How many seconds a process waits for the one that failed first, which prints the reason."""

FAREWELL = b"\ndisha: stopped at once; every file that was written is complete\n"


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to stop.

    Args:
        number: the number of the signal.
        message: what to print; empty if there is nothing to add.
    """

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message)
        self.number = number


@dataclass
class _State:
    """What is known of signals. They belong to the process, so there is one state."""

    listens: bool = False
    raises: bool = True
    number: int | None = None
    since: float = 0.0
    of_children: Any = None


_state = _State()


@contextmanager
def listening() -> Iterator[None]:
    """Let a signal raise `Interrupted` inside the block.

    Inside another such block, and outside the main thread, this changes nothing.
    """
    if _state.listens or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.getsignal(n) for n in SIGNALS if signal.getsignal(n) in USUAL}
    _state.listens, _state.raises, _state.number = True, True, None
    for number in before:
        signal.signal(number, _receive)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if _state.of_children is not None:
            signal.signal(signal.SIGCHLD, _state.of_children)
        _state.listens, _state.number, _state.of_children = False, None, None


@contextmanager
def raising(allowed: bool) -> Iterator[None]:
    """Inside the block, let a signal raise `Interrupted`, or only be noted.

    A signal that was noted before raises at the beginning of a block that allows it.

    Args:
        allowed: whether a signal raises.
    """
    before, _state.raises = _state.raises, allowed
    try:
        if allowed and _state.number is not None:
            raise Interrupted(_state.number)
        yield
    finally:
        _state.raises = before


def noted_signal() -> int | None:
    """Return the number of the signal that asked the process to stop, or None."""
    return _state.number


def wait_for_first() -> None:
    """Wait until torchrun stops this process, which it does once another one has ended.

    If this process ended before the one that failed first, torchrun would stop that one before it
    has printed the reason.
    """
    with raising(False):
        end = time.monotonic() + LONGEST_WAIT
        while noted_signal() is None and time.monotonic() < end:
            time.sleep(0.05)


def forget_signal() -> None:
    """Forget a signal that was noted; the next one counts as the first."""
    _state.number = None


def _receive(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _state.number is None:
        _state.number, _state.since = number, now
        if hasattr(signal, "SIGCHLD"):
            # The signal may have ended worker processes too, which torch would take for a failure.
            _state.of_children = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if _state.raises:
            raise Interrupted(number)
    elif now - _state.since > TOGETHER:
        if os.environ.get("RANK", "0") == "0":
            os.write(2, FAREWELL)  # printing is not safe in a handler
        os._exit(128 + number)
