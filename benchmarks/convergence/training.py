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
from benchmarks.convergence.tasks import EVERY_TASK
from benchmarks.convergence.tasks.task import Task, batch_order

HEAD_RATE = 1e-3
"""The learning rate of new heads, the same for all methods."""
WARM_UP = 0.06


def train(run: Run) -> dict[str, Any]:
    """Do a run and return its results."""
    task = EVERY_TASK[run.cell.task]
    started = time.perf_counter()
    model = copy.deepcopy(task.base())
    torch.manual_seed(run.seed)
    adapt(model, task.layers[run.cell.layers], task.head, run.cell)
    curve = _train(task, model, run)
    model.eval()
    found = {
        "parameters": sum(p.numel() for p in adapter_parameters(model, task.head)),
        "steps": [step for step, _ in curve],
        "validation": [_finite(loss) for _, loss in curve],
    }
    if None not in found["validation"]:
        found |= _results(task, model)
    return {**found, "seconds": time.perf_counter() - started}


def _train(task: Task, model: nn.Module, run: Run) -> list[tuple[int, float]]:
    """Train, and return (step, validation loss) pairs."""
    rows, validation = task.rows.training, task.rows.validation
    optimizer, schedule = optimizer_for(task, model, run.rate)
    curve = [(0, task.score(model, validation))]
    for step, indices in enumerate(batch_order(len(rows), task.batch, task.steps, run.seed), 1):
        task.loss(model, task.batch_of([rows[i] for i in indices])).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % task.evaluate_every == 0 or step == task.steps:
            curve.append((step, task.score(model, validation)))
            if not math.isfinite(curve[-1][1]):
                break
    return curve


def optimizer_for(
    task: Task, model: nn.Module, rate: float
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return AdamW without decay, and the schedule, which is the same for all methods."""
    groups = [{"params": adapter_parameters(model, task.head), "lr": rate}]
    if task.head is not None:
        head = model.get_submodule(task.head)
        groups.append({"params": list(head.parameters()), "lr": HEAD_RATE})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, task.steps))
    return optimizer, schedule


def cosine(step: int, steps: int) -> float:
    """Return the factor of the learning rate at a step: a short warm-up, then a cosine to zero."""
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _results(task: Task, model: nn.Module) -> dict[str, Any]:
    """Return the test loss, and forgetting before and after; the same for every scale."""
    test, scales = task.rows.test, []
    for scale in task.scales:
        set_scale(model, scale)
        measured = task.score(model, test), task.forgotten(model, task.base())[1]
        scales.append([scale, *map(_finite, measured)])
    if scales:
        set_scale(model, 1.0)
    return {
        "loss": _finite(task.score(model, test)),
        "forgetting": [*map(_finite, task.forgotten(model, task.base()))],
        **({"scales": scales} if scales else {}),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
