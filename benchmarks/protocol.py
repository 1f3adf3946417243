"""How times are taken: in one process, candidate by candidate, in rounds of shuffled order.

A ratio is taken within a round, so that what slows the machine for a while slows both of its
terms; what is reported is the median over the rounds, with the quartiles as its spread.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Budget", "Spread", "compare", "paired_ratios", "synchroniser"]

Run = Callable[[], object]


@dataclass(frozen=True)
class Budget:
    """How long one comparison may take.

    Args:
        seconds: no new round starts after that, warm-up included.
        least_rounds: so many rounds are measured whatever they take.
        most_rounds: so many are enough.
        warm_up: rounds before those, whose times are thrown away.
    """

    seconds: float
    least_rounds: int = 5
    most_rounds: int = 100
    warm_up: int = 2


@dataclass(frozen=True)
class Spread:
    """A median with the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the median and quartiles of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def paired_ratios(seconds: Mapping[str, Sequence[float]], name: str, to: str) -> list[float]:
    """Return time of `name` / time of `to`, round by round.

    Args:
        seconds: candidate -> seconds in each round, as `compare` returns them.
        name: the candidate.
        to: what it is compared with.
    """
    return [one / other for one, other in zip(seconds[name], seconds[to], strict=True)]


def compare(
    runs: Mapping[str, Run],
    budget: Budget,
    *,
    synchronise: Callable[[], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Time every run once per round, in an order that is shuffled in each.

    Args:
        runs: name -> what to time.
        budget: when to stop.
        synchronise: waits until the device has done what it was given; nothing on a CPU.
        clock: seconds.
        seed: of the orders.

    Returns:
        name -> seconds in each round, warm-up excluded.
    """
    wait = synchronise or (lambda: None)
    order, shuffle = list(runs), random.Random(seed).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    started, rounds = clock(), -budget.warm_up
    collecting = gc.isenabled()
    gc.disable()
    try:
        while rounds < budget.most_rounds:
            if rounds >= budget.least_rounds and clock() - started >= budget.seconds:
                break
            shuffle(order)
            for name in order:
                wait()
                before = clock()
                runs[name]()
                wait()
                if rounds >= 0:
                    seconds[name].append(clock() - before)
            rounds += 1
    finally:
        if collecting:
            gc.enable()
            gc.collect()
    return seconds


def synchroniser(device: torch.device) -> Callable[[], None] | None:
    """Return what waits for `device`, or None where calls return when they are done."""
    return torch.cuda.synchronize if device.type == "cuda" else None
