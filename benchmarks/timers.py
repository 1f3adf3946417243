"""How the time of a run is taken: by a clock around it, or by events in the queue of a GPU.

A processor returns from an operation when it is done. A GPU returns at once, and works through a
queue. A clock must wait for the queue to be empty before and after a run; it then also counts the
time in which the GPU waits for the first operation. Events stand in the queue itself, and count
from the moment at which the GPU reaches them.

Short runs are taken several at a time, so that what begins and ends a measurement counts little.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

Run = Callable[[], object]

CLEARED_BYTES = 2**28
"""More than the cache of any GPU."""
WARM_WIDTH = 4096


class Timer(Protocol):
    """Tells the time, for budgets, and takes the time of a run."""

    def now(self) -> float: ...

    def seconds(self, run: Run) -> float: ...


def wait_for_device() -> None:
    """Wait until the accelerator has done what it was given, if this process uses one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


class ClockTimer:
    """Takes the time by a clock, with an idle device before and after the run."""

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        wait: Callable[[], None] = wait_for_device,
        times: int = 1,
    ) -> None:
        self.now, self._wait, self._times = clock, wait, times

    def seconds(self, run: Run) -> float:
        self._wait()
        before = self.now()
        for _ in range(self._times):
            run()
        self._wait()
        return (self.now() - before) / self._times


class EventTimer:
    """Takes the time by events of CUDA, with a cleared cache.

    Clearing takes the GPU long enough for the first operations of the run to be in the queue when
    it reaches the first event.
    """

    def __init__(self, device: torch.device, times: int = 1) -> None:
        self.now, self._times = time.perf_counter, times
        self._first, self._last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._cleared = torch.empty(CLEARED_BYTES, dtype=torch.uint8, device=device)

    def seconds(self, run: Run) -> float:
        torch.cuda.synchronize()
        self._cleared.zero_()
        self._first.record()
        for _ in range(self._times):
            run()
        self._last.record()
        self._last.synchronize()
        milliseconds = self._first.elapsed_time(self._last)
        return milliseconds / 1000 / self._times


def timer_of(device: torch.device, times: int = 1) -> Timer:
    """Return the timer that suits a device, which takes a run so many times."""
    if device.type == "cuda":
        return EventTimer(device, times)
    return ClockTimer(times=times)


def warm(device: torch.device, seconds: float) -> None:
    """Multiply for a while, so that an accelerator has left the clock rate of its rest."""
    if device.type == "cpu":
        return
    square = torch.randn(WARM_WIDTH, WARM_WIDTH, device=device)
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        torch.mm(square, square)
        wait_for_device()
