"""The pictures of the report, as SVG: the same bytes for the same findings."""

from __future__ import annotations

import io
import math
import re
import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.convergence.findings import (
    RATIOS,
    Longer,
    Overall,
    TaskFindings,
    points,
    ratios,
)
from benchmarks.convergence.methods import IDENTITY, METHODS
from benchmarks.convergence.tasks import TASKS

COMPARED = ("bone", "bat", "rslora", IDENTITY)
"""The methods that the verdict compares with LoRA."""
STYLES: Mapping[str, tuple[str, str]] = {
    "bone": ("tab:blue", "-"),
    "bat": ("tab:purple", "-"),
    "lora": ("black", "--"),
    "rslora": ("tab:gray", "--"),
    "dora": ("tab:red", "--"),
    IDENTITY: ("tab:brown", "-."),
}
MARKS = "os^vP"
"""How the tasks are marked, in their order."""
HASHED = re.compile(r'(?<=["#])[mp][0-9a-f]{10}(?=["\)])')
"""The names that matplotlib gives to markers and clip paths."""


def compared(found: Mapping[str, TaskFindings]) -> bytes:
    """Plot every ratio of the verdict: a panel for each, a dot for each task, the mean on top."""
    figure = _figure(7.0, 7.5)
    for place, what in enumerate(RATIOS):
        axes = figure.add_subplot(2, 2, place + 1)
        for row, method in enumerate(COMPARED):
            one = ratios(found, method, what)
            overall, colour = Overall.of(list(one.values())), STYLES[method][0]
            if len(one) > 1:
                axes.plot([overall.low, overall.high], [row, row], color=colour, linewidth=3)
            axes.plot(overall.value, row, "D", color=colour, markersize=9)
            for task, ratio in one.items():
                axes.plot(ratio, row + 0.25, MARKS[list(TASKS).index(task)], color="tab:gray",
                          markersize=6, label=TASKS[task].title if row == 0 else None)  # fmt: skip
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_ylim(len(COMPARED) - 0.4, -0.5)
        axes.set_yticks(range(len(COMPARED)), [METHODS[name].title for name in COMPARED])
        axes.set_title(f"{what} / LoRA", fontsize=12)
        axes.tick_params(labelsize=11)
        axes.grid(alpha=0.3, axis="x")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=10)
    return _svg(figure)


def longer_training(found: Longer) -> bytes:
    """Plot the longer training: loss over rates, and over forgetting."""
    figure = _figure(7.0, 8.0)
    tried, scales = (figure.add_subplot(2, 1, panel + 1) for panel in range(2))
    for name, one in found.own.items():
        style = {"color": STYLES[name][0], "linestyle": STYLES[name][1], "marker": "o"}
        known = [(r, loss) for r in found.rates if (loss := found.loss(name, r)) is not None]
        rates, losses = zip(*(pair for pair in known if pair[1] < math.inf), strict=True)
        tried.plot(rates, losses, label=METHODS[name].title, **style)
        curves = zip(*map(points, one.records), strict=True)
        means = [[statistics.fmean(values) for values in zip(*same, strict=True)]
                 for same in curves]  # fmt: skip
        scales.plot([m[2] - found.base for m in means], [m[1] for m in means], **style)
    untrained = points(next(iter(found.own.values())).records[0])[0].loss
    for axes, across in (
        (tried, "learning rate, one for all"),
        (scales, "forgetting, at scales from 0 to 1 and the own rate"),
    ):
        axes.set_xlabel(across, fontsize=11)
        axes.set_ylabel("test loss", fontsize=11)
        axes.set_ylim(top=untrained)  # else one bad run flattens it
        axes.tick_params(labelsize=11)
        axes.grid(alpha=0.3)
    tried.set_xscale("log")
    tried.legend(fontsize=10)
    return _svg(figure)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Any) -> bytes:
    import matplotlib as mpl

    buffer = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, facecolor="white")
    lines = _numbered(buffer.getvalue().decode("utf-8")).splitlines()
    return ("\n".join(line.rstrip() for line in lines) + "\n").encode("utf-8")


def _numbered(svg: str) -> str:
    """Number markers and clip paths: their own names are hashes that differ between machines."""
    names: dict[str, str] = {}

    def numbered(found: re.Match[str]) -> str:
        return names.setdefault(found[0], f"{found[0][0]}{len(names) + 1}")

    return HASHED.sub(numbered, svg)
