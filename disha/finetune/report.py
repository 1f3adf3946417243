"""The files that tell what a run did: metrics, plot, samples and report."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

import disha
from disha.finetune.errors import OutputError
from disha.finetune.training.loop import Step

__all__ = [
    "Sample",
    "environment",
    "loss_plot",
    "metrics_line",
    "open_metrics",
    "peak_memory",
    "samples_page",
    "write_file",
]

REPORTED_PACKAGES = ("torch", "safetensors", "einops", "gguf", "tokenizers", "numpy")
SMOOTHED_STEPS = 10


@dataclass(frozen=True)
class Sample:
    """One prompt with what the model made of it before and after training, and the reference."""

    query: str
    before: str
    after: str
    reference: str


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; an earlier one stays until the new one is complete.

    Raises:
        OutputError: it can't be written.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"{path} can't be written: {error.strerror}") from error


def open_metrics(path: Path) -> TextIO:
    """Open the file of metrics, emptied; each line reaches the disk when it is complete.

    Raises:
        OutputError: it can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w", encoding="utf-8", buffering=1)
    except OSError as error:
        raise OutputError(f"{path} can't be written: {error.strerror}") from error


def metrics_line(step: Step) -> str:
    """One line of the metrics: the step as JSON, without what was not measured."""
    values = {k: v for k, v in dataclasses.asdict(step).items() if v is not None}
    return json.dumps(values) + "\n"


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
    from matplotlib.figure import Figure

    numbers, losses = [step.step for step in steps], [step.loss for step in steps]
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
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
    for number, loss in evaluations.items():
        axes.annotate(
            f"{loss:.2f}", (number, loss), xytext=(0, 8), textcoords="offset points", ha="center"
        )
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.margins(x=0.04, y=0.1)
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def samples_page(samples: Sequence[Sample], origin: str) -> str:
    """A Markdown page of prompts with the texts before and after training.

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


def environment() -> dict[str, Any]:
    """Versions of what computes, and the machine it runs on."""
    versions = {name: importlib.metadata.version(name) for name in REPORTED_PACKAGES}
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
    """The most memory this process had resident so far, in bytes; None where unknown."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _running_means(values: Sequence[float]) -> list[float]:
    windows = [values[max(0, end - SMOOTHED_STEPS) : end] for end in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]


def _titled(title: str, text: str) -> str:
    # A fence longer than any in the text, so that the text can't end it.
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"**{title}**\n\n{fence}text\n{text.strip()}\n{fence}\n"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
