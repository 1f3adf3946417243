"""How times are measured: in one process, in rounds of all candidates in random order.

Ratios are taken within a round, so whatever slows the machine for a while slows both terms. Reports
show the median over the rounds, and the quartiles.
"""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch

from benchmarks.timers import ClockTimer, Run, Timer

R = 64
"""The shard size of every table; LoRA gets the rank with as many trainable parameters."""
COMPILED = "_compiled"
"""What the name of a candidate ends in where its step is compiled."""

TRIED_WIDTH = 512
FAR_SLOWER = 10.0
"""Times slower than float32. Converting to float32 and back costs a few times as much, not ten."""


class Budget(NamedTuple):
    """No new round starts after these seconds, but for the least rounds. Warm-up comes first."""

    seconds: float
    least_rounds: int = 5
    most_rounds: int = 100
    warm_up: int = 2


class Spread(NamedTuple):
    """A median with the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def paired_ratios(seconds: Mapping[str, Sequence[float]], name: str, to: str) -> list[float]:
    """Return time of `name` / time of `to`, round by round."""
    return [one / other for one, other in zip(seconds[name], seconds[to], strict=True)]


def compare(
    runs: Mapping[str, Run], budget: Budget, timer: Timer | None = None
) -> dict[str, list[float]]:
    """Time every run once per round, in a new random order each round.

    Without a timer, it is the clock's time.
    """
    timer = timer or ClockTimer()
    order, shuffle = list(runs), random.Random(0).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    started, rounds = timer.now(), -budget.warm_up
    collecting = gc.isenabled()
    gc.disable()
    try:
        while rounds < budget.most_rounds:
            if rounds >= budget.least_rounds and timer.now() - started >= budget.seconds:
                break
            shuffle(order)
            for name in order:
                taken = timer.seconds(runs[name])
                if rounds >= 0:
                    seconds[name].append(taken)
            rounds += 1
    finally:
        if collecting:
            gc.enable()
            gc.collect()
    return seconds


def slow_dtypes(dtypes: Collection[torch.dtype], device: torch.device) -> dict[torch.dtype, float]:
    """Return the dtypes that the device has no instructions for.

    Its products then take many times as long, those of the frozen base too. They say nothing about
    an adapter.
    """
    square = torch.randn(TRIED_WIDTH, TRIED_WIDTH, device=device)
    operands = {dtype: square.to(dtype) for dtype in (torch.float32, *dtypes)}
    products = {str(dtype): lambda one=one: one @ one for dtype, one in operands.items()}
    seconds = compare(products, Budget(0.0, least_rounds=3, warm_up=1))
    fastest = {dtype: min(seconds[str(dtype)]) for dtype in operands}
    ratios = {dtype: taken / fastest[torch.float32] for dtype, taken in fastest.items()}
    return {dtype: ratio for dtype, ratio in ratios.items() if ratio > FAR_SLOWER}
