"""Limits on time and memory, for a process that was made to try one thing after another."""

from __future__ import annotations

import contextlib
import faulthandler
import resource
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

__all__ = ["Usage", "limit_process", "limited", "limited_to"]

SECONDS = 2.0
"""Of processor time, so that a busy machine is no hang."""

SECONDS_FOR_MEGABYTE = 0.2
"""Besides: what takes the square of a file's size takes far more, and is still found."""

SECONDS_WAITING = 60.0
"""Of the clock on the wall, for what waits and does not work."""

FREE = 48 << 20
"""Bytes that anything may take, whatever the file's size."""

TIMES_SIZE = 40
"""How many times its size a file may take besides: JSON takes most as objects."""

ADDRESSES = 4 << 30
"""Bytes of addresses that nothing may go beyond: rather fail than bring the machine down."""


def limit_process(stacks: TextIO) -> None:
    """Let this process die of a hang and fail of a huge allocation.

    Args:
        stacks: where a hang's stack goes.
    """
    global _may_die
    _may_die = True
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGPROF, stacks, chain=True)
    faulthandler.register(signal.SIGALRM, stacks, chain=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    addresses = _status("VmSize")
    if addresses:
        resource.setrlimit(resource.RLIMIT_AS, (addresses + ADDRESSES,) * 2)


_may_die = False


@dataclass
class Usage:
    """The most that anything took: seconds of processor time, and bytes beyond what was there."""

    seconds: float = 0.0
    memory: int = 0


@contextlib.contextmanager
def limited(size: int, usage: Usage) -> Iterator[None]:
    """Run the body with limits in proportion to a file.

    Args:
        size: size of the file that it is about, in bytes.
        usage: where to note what it took, if that is the most.

    Raises:
        AssertionError: it took more memory than it may.
    """
    with limited_to(SECONDS + SECONDS_FOR_MEGABYTE * size / 1e6, FREE + TIMES_SIZE * size, usage):
        yield


@contextlib.contextmanager
def limited_to(seconds: float, memory: int, usage: Usage) -> Iterator[None]:
    """Run the body with limits, those on time only in a process that was made to die of them.

    Args:
        seconds: of processor time.
        memory: bytes beyond what was there.
        usage: where to note what it took, if that is the most.

    Raises:
        AssertionError: it took more memory than it may.
    """
    resident, start = _reset_peak(), time.process_time()
    if _may_die:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, SECONDS_WAITING)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        peak = _peak_now() - resident
        usage.seconds = max(usage.seconds, time.process_time() - start)
        usage.memory = max(usage.memory, peak)
        # Also of what is refused: it leaves the body by its error.
        assert peak <= memory, f"took {peak:,} bytes, and may take {memory:,}"


def _reset_peak() -> int:
    """Let the peak start anew where the system can; return the bytes that are resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux: the peak only grows, and less is seen
        return _peak_now()
    return _status("VmRSS")


def _peak_now() -> int:
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(field: str) -> int:
    """Return a field of /proc/self/status in bytes, or 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    value = next((line.split()[1] for line in lines if line.startswith(f"{field}:")), "0")
    return int(value) * 1024
