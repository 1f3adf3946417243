"""The files that a run writes at its end: plots, samples, and a report on run and machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import disha
from disha.files import write_files
from disha.finetune.scales import AtScale, best_scale
from disha.finetune.training.loop import Step

__all__ = ["Sample", "environment", "peak_memory", "plot_learning_rates", "plot_losses"]
__all__ += ["plot_scales", "samples_page", "write_figure", "write_text"]

T = TypeVar("T")

REPORTED_PACKAGES = ("torch", "safetensors", "einops", "gguf", "tokenizers", "numpy")
SMOOTHED_STEPS = 10
MOST_NUMBERS = 12
"""Most points of a plot with a label. More labels overlap, and take minutes to lay out."""


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all.

    Raises:
        AdapterIOError: the file can't be written. An earlier file stays as it was.
    """
    write_files({path: lambda temporary: Path(temporary).write_text(text, encoding="utf-8")})


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG, completely or not at all.

    Raises:
        AdapterIOError: the file can't be written. An earlier file stays as it was.
    """
    write_files({path: lambda temporary: figure.savefig(temporary, format="png")})


# --- samples -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A prompt with the model's answers before and after training, and the reference."""

    query: str
    before: str
    after: str
    reference: str


def samples_page(samples: Sequence[Sample], origin: str) -> str:
    """Return a Markdown page of prompts with the texts before and after training.

    Args:
        samples: what to show.
        origin: where the prompts are from, such as "held-out".
    """
    parts = [f"# Before and after\n\nPrompts from the {origin} rows; greedy decoding.\n"]
    for number, sample in enumerate(samples, start=1):
        parts.append(f"## Sample {number}\n")
        parts.append(_titled("Prompt", sample.query))
        parts.append(_titled("Before", sample.before))
        parts.append(_titled("After", sample.after))
        parts.append(_titled("Reference", sample.reference))
    return "\n".join(parts)


def _titled(title: str, text: str) -> str:
    # The fence is longer than any in the text, so that the text can't end it.
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"**{title}**\n\n{fence}text\n{text.strip()}\n{fence}\n"


# --- plots ---------------------------------------------------------------------------------------


def plot_losses(
    steps: Sequence[Step], evaluations: Mapping[int, float], title: str, checked: str
) -> Figure:
    """Plot the training loss of each step, and the loss measured on fixed rows.

    Args:
        steps: the optimizer steps.
        evaluations: the measured losses, by the number of steps done before.
        title: what was trained.
        checked: the name of the rows of the evaluations, such as "held-out".
    """
    numbers, losses = [step.step for step in steps], [step.loss for step in steps]
    figure, axes = _axes("optimizer step", "loss (nats per token)", title)
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
    return figure


def plot_learning_rates(steps: Sequence[Step], title: str) -> Figure:
    """Plot the learning rate and the gradient's norm of each step.

    Args:
        steps: the optimizer steps.
        title: what was trained.
    """
    numbers = [step.step for step in steps]
    figure, axes = _axes("optimizer step", "learning rate", title)
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
    return figure


def plot_scales(found: Sequence[AtScale]) -> Figure:
    """Plot the losses at each scale of an adapter, and mark the best scale.

    Args:
        found: the losses; on rows to retain at all scales or at none.
    """
    found = sorted(found, key=lambda one: one.scale)
    figure, axes = _axes("scale of the adapter", "loss (nats per token)")
    scales = [one.scale for one in found]
    axes.plot(scales, [one.loss for one in found], marker="o", label="rows of the task")
    others = [one.retained for one in found if one.retained is not None]
    if others:
        axes.plot(scales, others, marker="s", label="rows to retain")
    best = best_scale(found).scale
    axes.axvline(best, color="tab:gray", linestyle="--", label=f"best scale: {best:g}")
    axes.legend()
    return figure


def _axes(xlabel: str, ylabel: str, title: str = "") -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, parse_math=False)  # the name of a model may have dollar signs
    axes.margins(x=0.04, y=0.1)
    axes.grid(alpha=0.3)
    return figure, axes


def _spread(points: Sequence[T]) -> Sequence[T]:
    """Return at most `MOST_NUMBERS` evenly spread points, with the first and the last."""
    last = len(points) - 1
    if last < MOST_NUMBERS:
        return points
    return [points[i * last // (MOST_NUMBERS - 1)] for i in range(MOST_NUMBERS)]


def _running_means(values: Sequence[float]) -> list[float]:
    windows = [values[max(0, end - SMOOTHED_STEPS) : end] for end in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]


# --- the machine ---------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Return the versions of the main packages, and a description of the machine.

    A version is None if the package is not installed, or does not say its version.
    """
    versions = {name: _version(name) for name in REPORTED_PACKAGES}
    has_cuda = torch.cuda.is_available()
    return {
        "versions": {"python": platform.python_version(), "disha": disha.__version__, **versions},
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if has_cuda else "cpu",
        },
    }


def peak_memory() -> int | None:
    """Return this process's peak resident memory so far, in bytes; None if unknown."""
    # On Linux, `getrusage` also counts the memory of the process that started this one.
    found = re.search(r"^VmHWM:\s*(\d+) kB$", _text_of("/proc/self/status"), re.MULTILINE)
    if found:
        return int(found[1]) * 1024
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    found = re.search(r"^model name\s*: (.+)$", _text_of("/proc/cpuinfo"), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _text_of(path: str) -> str:
    """Return the text of a file that only Linux has; elsewhere, an empty text."""
    return Path(path).read_text() if Path(path).exists() else ""
