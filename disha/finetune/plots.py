"""Pictures of how a run went: its losses, and its learning rates."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from disha.finetune.training.loop import Step

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["learning_rate_plot", "loss_plot"]

T = TypeVar("T")

SMOOTHED_STEPS = 10
MOST_NUMBERS = 12
"""How many points have their value beside them; more can't be read, and take minutes to lay out."""


def loss_plot(
    steps: Sequence[Step], evaluations: Mapping[int, float], title: str, checked: str
) -> bytes:
    """A PNG of the training loss per step and the loss measured on fixed rows.

    Args:
        steps: the optimiser steps.
        evaluations: losses by the number of steps done before.
        title: what was trained.
        checked: what rows the evaluations were on, such as "held-out".
    """
    numbers, losses = [step.step for step in steps], [step.loss for step in steps]
    figure, axes = _axes(title, "loss (nats per token)")
    axes.plot(numbers, losses, color="tab:blue", alpha=0.3, label="training loss, each step")
    axes.plot(
        numbers,
        _running_means(losses),
        color="tab:blue",
        label=f"training loss, mean of last {SMOOTHED_STEPS} steps",
    )
    axes.plot(
        list(evaluations),
        list(evaluations.values()),
        color="tab:orange",
        marker="o",
        linewidth=2,
        label=f"{checked} loss",
    )
    for number, loss in _spread(tuple(evaluations.items())):
        axes.annotate(
            f"{loss:.2f}", (number, loss), xytext=(0, 8), textcoords="offset points", ha="center"
        )
    axes.legend()
    return _png(figure)


def learning_rate_plot(steps: Sequence[Step], title: str) -> bytes:
    """A PNG of the learning rate and the gradient's norm per step.

    Args:
        steps: the optimiser steps.
        title: what was trained.
    """
    numbers = [step.step for step in steps]
    figure, axes = _axes(title, "learning rate")
    rates = axes.plot(numbers, [step.learning_rate for step in steps], label="learning rate")
    norms = axes.twinx()
    norms.set_ylabel("gradient norm, before clipping")
    curve = norms.plot(
        numbers,
        [step.gradient_norm for step in steps],
        color="tab:grey",
        alpha=0.5,
        label="gradient norm",
    )
    axes.legend(handles=[*rates, *curve])
    return _png(figure)


def _axes(title: str, ylabel: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    axes.margins(x=0.04, y=0.1)
    axes.grid(alpha=0.3)
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _spread(points: Sequence[T]) -> Sequence[T]:
    """Some points, the first and the last among them."""
    last = len(points) - 1
    if last < MOST_NUMBERS:
        return points
    return [points[i * last // (MOST_NUMBERS - 1)] for i in range(MOST_NUMBERS)]


def _running_means(values: Sequence[float]) -> list[float]:
    windows = [values[max(0, end - SMOOTHED_STEPS) : end] for end in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]
