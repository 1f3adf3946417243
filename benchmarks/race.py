"""Build, check, compare: what every table of layers and models does with its candidates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.memory import allocated_peak
from benchmarks.protocol import COMPILED, Budget, compare
from benchmarks.results import reason
from benchmarks.steps import TrainingStep, check_gradients
from benchmarks.timers import Run, Timer, timer_of, warm

MORE_COMPILATIONS = 64
"""The limit of compilations for one piece of code, which all candidates share."""

Make = Callable[[nn.Module, Callable[..., Any]], Run]
"""From a model, and the model or its compiled form, to what is timed."""


class Race(NamedTuple):
    """Which candidates run, for how long, and how their times are taken."""

    names: Sequence[str]
    budget: Budget
    compiled: bool = False
    """Whether each candidate also runs compiled."""
    backend: str = "inductor"
    mode: str | None = None
    timer: Timer | None = None
    """None for the one that suits the device."""
    times: int = 1
    """Runs in a measurement."""
    warm_seconds: float = 0.0


def run_race(
    models: Mapping[str, nn.Module],
    make: Make,
    race: Race,
    device: torch.device,
    memory: bool = False,
) -> dict[str, Any]:
    """Return the seconds of each candidate, and why others are missing; the peaks of memory too."""
    runs, missing = checked_runs(models, make, race)
    warm(device, race.warm_seconds)
    timer = timer_of(device, race.times) if race.timer is None else race.timer
    found: dict[str, Any] = {"seconds": compare(runs, race.budget, timer), "missing": missing}
    if memory:
        found["peak_bytes"] = {name: peak_of(run, device) for name, run in runs.items()}
    return found


def checked_runs(
    models: Mapping[str, nn.Module], make: Make, race: Race
) -> tuple[dict[str, Run], dict[str, str]]:
    """Return the runs of each model, and why others do not run or do not learn."""
    runs: dict[str, Run] = {}
    missing: dict[str, str] = {}
    with torch._dynamo.config.patch(recompile_limit=MORE_COMPILATIONS):
        for name, model in models.items():
            called: dict[str, Callable[..., Any]] = {name: model}
            if race.compiled:
                compiled = torch.compile(model, backend=race.backend, mode=race.mode)
                called[name + COMPILED] = compiled
            for title, one in called.items():
                run = make(model, one)
                try:
                    run()  # compiles
                    if isinstance(run, TrainingStep):
                        check_gradients(name, model)
                except Exception as error:
                    missing[title] = reason(error)
                else:
                    runs[title] = run
    return runs, missing


def peak_of(run: Run, device: torch.device) -> int | None:
    """Return the most bytes that a step allocates; None where no allocator counts them."""
    if device.type not in ("cuda", "cpu"):
        return None
    if isinstance(run, TrainingStep):
        run.clear()
    return allocated_peak(run, device)
