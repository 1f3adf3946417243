"""The plots of the report, as SVG: the same bytes for the same findings."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.convergence.findings import Finding, TaskFindings
from benchmarks.convergence.longer import Longer
from benchmarks.convergence.methods import METHODS
from benchmarks.convergence.tasks import TASKS
from benchmarks.convergence.verdict import COMPARED, RATIOS, Overall, ratios

__all__ = ["compared", "curves", "gradients", "longer", "rates"]

STYLES: Mapping[str, tuple[str, str]] = {
    "bone": ("tab:blue", "-"),
    "tile": ("tab:cyan", "-"),
    "bat": ("tab:purple", "-"),
    "lora": ("black", "--"),
    "rslora": ("tab:gray", "--"),
    "pissa": ("tab:orange", "--"),
    "olora": ("tab:olive", "--"),
    "dora": ("tab:red", "--"),
    "lora_identity": ("tab:brown", "-."),
    "loha": ("tab:pink", "--"),
    "full": ("tab:green", ":"),
}
FINE = {"bone", "bat", "lora"}
"""The methods whose seeds are shown as a band. More bands would hide each other."""
HASHED = re.compile(r'(?<=["#])[mp][0-9a-f]{10}(?=["\)])')
"""The names that matplotlib gives to markers and clip paths."""


def compared(found: Mapping[str, TaskFindings]) -> bytes:
    """Plot every ratio of the verdict: a panel for each, a dot for each task, the mean on top."""
    figure = _figure(8.0, 4.2)
    for place, what in enumerate(RATIOS):
        axes = figure.add_subplot(2, 2, place + 1)
        for row, method in enumerate(COMPARED):
            one = ratios(found, method, what)
            if not one:
                continue
            overall, colour = Overall.of(list(one.values())), STYLES[method][0]
            if len(one) > 1:
                axes.plot([overall.low, overall.high], [row, row], color=colour, linewidth=2)
            axes.plot(overall.value, row, "D", color=colour, markersize=7)
            for task, ratio in one.items():
                axes.plot(ratio, row + 0.25, MARKS[list(TASKS).index(task)], color="tab:gray",
                          markersize=4, label=TASKS[task].title if row == 0 else None)  # fmt: skip
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_ylim(len(COMPARED) - 0.4, -0.5)
        axes.set_yticks(range(len(COMPARED)), [METHODS[name].title for name in COMPARED])
        axes.set_title(f"{what} / LoRA", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3, axis="x")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = min(len(labels), 3)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=7)
    return _svg(figure)


MARKS = "os^vP"
"""How the tasks are marked, in their order."""


def curves(task: str, found: TaskFindings) -> bytes:
    """Plot the validation loss over steps and, if costs were measured, over seconds."""
    figure = _figure(10.0 if found.costs else 5.5, 4.2)
    panels = 2 if found.costs else 1
    for panel in range(panels):
        axes = figure.add_subplot(1, panels, panel + 1)
        for name, one in found.findings.items():
            if panel and name not in found.costs:
                continue
            unit = found.costs[name].seconds if panel else 1.0
            x = [step * unit for step in one.steps]
            colour, line = STYLES[name]
            axes.plot(x, one.curve, color=colour, linestyle=line, linewidth=1.5,
                      label=METHODS[name].title)  # fmt: skip
            if name in FINE:
                axes.fill_between(x, *one.band, color=colour, alpha=0.15, linewidth=0)
        axes.set_xlabel("seconds of training" if panel else "steps")
        axes.set_ylabel("validation loss")
        _log_losses(axes)
        axes.grid(alpha=0.3, which="both")
        if panel == 0:
            axes.legend(fontsize=7, ncols=2)
    figure.suptitle(TASKS[task].title, fontsize=10)
    return _svg(figure)


def longer(found: Longer) -> bytes:
    """Plot the longer training: loss over steps, over rates, and over forgetting."""
    figure = _figure(12.0, 4.0)
    steps, tried, scales = (figure.add_subplot(1, 3, panel + 1) for panel in range(3))
    for name, records in found.records.items():
        style = {"color": STYLES[name][0], "linestyle": STYLES[name][1]}
        known = [(r, loss) for r in found.rates if (loss := found.loss(name, r)) is not None]
        tried.plot(*_columns([one for one in known if one[1] < math.inf]), marker="o",
                   markersize=3, label=METHODS[name].title, **style)  # fmt: skip
        if name not in found.own:
            continue
        record = records[found.own[name]]
        steps.plot(record["steps"], record["validation"], **style)
        points = [(point.elsewhere - found.base, point.loss) for point in found.curve(name)]
        scales.plot(*_columns(points), marker="o", markersize=3, **style)
    for axes, across, up in (
        (steps, "steps, at its own rate", "validation loss"),
        (tried, "learning rate", "test loss"),
        (scales, "forgetting, at scales from 0 to 1", "test loss"),
    ):
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.grid(alpha=0.3)
    tried.set_xscale("log")
    tried.set_ylim(top=min(tried.get_ylim()[1], found.untrained))  # else one bad run flattens it
    tried.legend(fontsize=7)
    return _svg(figure)


def rates(found: Mapping[str, TaskFindings]) -> bytes:
    """Plot the final validation loss over the learning rate, a panel for each task."""

    def tried(axes: Any, method: Finding, **style: Any) -> None:
        known = [(r, loss) for r, loss in sorted(method.searched.items()) if loss < math.inf]
        axes.plot(*_columns(known), marker="o", markersize=3, **style)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        _log_losses(axes)

    return _panels(found, tried, "peak learning rate", "final validation loss, first seed")


def gradients(found: Mapping[str, TaskFindings]) -> bytes:
    """Plot the norm of the gradient in the first steps, a panel for each task."""

    def norms(axes: Any, method: Finding, **style: Any) -> None:
        axes.plot(range(1, len(method.gradients) + 1), method.gradients, **style)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")

    return _panels(found, norms, "step", "norm of the gradient")


def _panels(
    found: Mapping[str, TaskFindings], draw: Callable[..., None], across: str, up: str
) -> bytes:
    """Return a picture with a panel for each task, in which `draw` draws each method."""
    rows = math.ceil(len(found) / 2)
    figure = _figure(9.2, 3.8 * rows)
    for place, (task, one) in enumerate(found.items()):
        axes = figure.add_subplot(rows, 2, place + 1)
        for name, method in one.findings.items():
            colour, line = STYLES[name]
            draw(axes, method, color=colour, linestyle=line, label=METHODS[name].title)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.set_title(TASKS[task].title, fontsize=9)
        axes.grid(alpha=0.3, which="both")
        if place == 0:
            axes.legend(fontsize=6, ncols=2)
    return _svg(figure)


def _log_losses(axes: Any) -> None:
    """Put losses on a logarithmic axis, which is often too short for powers of ten alone."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(lambda loss, place: _if_round(loss))


def _if_round(number: float) -> str:
    """Return a number as text if it is 2, 3 or 5 times a power of ten."""
    return f"{number:g}" if f"{number:.0e}"[0] in "235" else ""


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [one for one, _ in pairs], [other for _, other in pairs]


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
    """Return a picture with its markers and clip paths numbered in the order of appearance.

    Matplotlib's own names are hashes with a random salt. A fixed salt is not enough: exact
    coordinates are hashed too, and their last bits differ from processor to processor.
    """
    names: dict[str, str] = {}

    def numbered(found: re.Match[str]) -> str:
        return names.setdefault(found[0], f"{found[0][0]}{len(names) + 1}")

    return HASHED.sub(numbered, svg)
