"""One run: adapt, train, and measure the result."""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import torch
from torch import nn

from benchmarks.convergence.methods import adapt, adapter_parameters, set_scale
from benchmarks.convergence.runs import Run
from benchmarks.convergence.tasks import TASKS
from benchmarks.convergence.tasks.task import Task, batch_order

__all__ = ["HEAD_RATE", "WARM_UP", "cosine", "optimizer_for", "train"]

HEAD_RATE = 1e-3
"""The learning rate of new heads, the same for all methods."""
WARM_UP = 0.06


def train(run: Run, device: torch.device, task: Task | None = None) -> dict[str, Any]:
    """Do a run and return its results."""
    task = task or TASKS[run.cell.task]
    started = time.perf_counter()
    # Always adapted on the CPU, so that the initial values are the same on every device.
    model = copy.deepcopy(task.base()).cpu()
    torch.manual_seed(run.seed)
    adapt(model, task.layers[run.cell.layers], task.head, run.cell)
    model.to(device)
    curve = _train(task, model, run, device)
    model.eval()
    base = task.base().to(device)
    found = {
        "parameters": sum(p.numel() for p in adapter_parameters(model, task.head)),
        "steps": [step for step, _ in curve],
        "validation": [_finite(loss) for _, loss in curve],
    }
    if all(loss is not None for loss in found["validation"]):
        found |= _results(task, model, base)
    return {**found, "seconds": time.perf_counter() - started}


def _train(task: Task, model: nn.Module, run: Run, device: torch.device) -> list[tuple[int, float]]:
    """Train, and return (step, validation loss) pairs."""
    rows = task.training_rows()
    optimizer, schedule = optimizer_for(task, model, run.rate)
    curve = [(0, task.validation_loss(model))]
    for step, indices in enumerate(batch_order(len(rows), task.batch, task.steps, run.seed), 1):
        loss = task.loss(model, task.batch_of([rows[i] for i in indices], device))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % task.evaluate_every == 0 or step == task.steps:
            curve.append((step, task.validation_loss(model)))
            if not math.isfinite(curve[-1][1]):
                break
    return curve


def optimizer_for(
    task: Task, model: nn.Module, rate: float
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return AdamW without decay, and the schedule, which is the same for all methods."""
    groups = [{"params": adapter_parameters(model, task.head), "lr": rate}]
    if task.head is not None:
        groups.append({"params": list(model.get_submodule(task.head).parameters()),
                       "lr": HEAD_RATE})  # fmt: skip
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, task.steps))
    return optimizer, schedule


def cosine(step: int, steps: int) -> float:
    """Return the factor of the learning rate at a step: a short warm-up, then a cosine to zero."""
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _results(task: Task, model: nn.Module, base: nn.Module) -> dict[str, Any]:
    score = task.test(model)
    before, after = task.forgotten(model, base)
    found = {} if not task.scales else {"scales": _by_scale(task, model, base)}
    return found | {
        "loss": _finite(score.loss),
        "exact": score.exact,
        "forgetting": [_finite(before), _finite(after)],
    }


def _by_scale(task: Task, model: nn.Module, base: nn.Module) -> list[list[float | None]]:
    """Return scale, test loss and forgetting for every scale of the task."""
    found = []
    for scale in task.scales:
        set_scale(model, scale)
        measured = task.test(model).loss, task.forgotten(model, base)[1]
        found.append([scale, *map(_finite, measured)])
    set_scale(model, 1.0)
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
