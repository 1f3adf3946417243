"""Where the time of a run goes, operator by operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["PROFILED", "time_by_operator", "time_by_operators"]

PROFILED = ("frozen", "bone", "bat")
"""The candidates whose time is taken apart."""

LEAST = 0.01
"""A smaller share is not told."""


def time_by_operator(
    run: Callable[[], object], device: torch.device, most: int = 6
) -> dict[str, float]:
    """Return operator -> its share of a run's time, the largest first.

    Args:
        run: what to look at, warmed up already.
        device: where it computes.
        most: so many operators.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    times = {
        event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total
        for event in recorded.key_averages()
    }
    total = sum(times.values()) or 1.0
    largest = sorted(times, key=lambda key: -times[key])[:most]
    return {key: times[key] / total for key in largest if times[key] >= LEAST * total}


def time_by_operators(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    names: Iterable[str] = PROFILED,
) -> dict[str, dict[str, float]]:
    """Return what time_by_operator does for each of `names` that is among the runs."""
    return {name: time_by_operator(runs[name], device) for name in names if name in runs}
