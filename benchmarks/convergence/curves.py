"""The pictures of the report, as SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.convergence.findings import (
    KEPT,
    OTHER,
    Finished,
    Longer,
    Overall,
    longer,
    main_findings,
    ratios,
)
from benchmarks.convergence.methods import METHODS, SHIRA
from benchmarks.convergence.runs import Results
from benchmarks.convergence.tables import COMPARED
from benchmarks.convergence.tasks import TASKS

STYLES: Mapping[str, tuple[str, str]] = {
    "bone": ("tab:blue", "-"),
    "bat": ("tab:purple", "-"),
    "lora": ("black", "--"),
    "rslora": ("tab:gray", "--"),
    "dora": ("tab:red", "--"),
    SHIRA: ("tab:green", "--"),
    "groups3": ("tab:cyan", "-"),
    "groups_all": ("tab:orange", "-"),
}
SHOWN = [0.02 * step for step in range(1, 33)]  # limits of forgetting
MARKS = "os^vP"  # of the tasks, in their order


def drawn(results: Results) -> dict[str, bytes]:
    """Return name -> picture."""
    long = longer(results)
    return {
        "verdict": compared(main_findings(results)),
        "longer": longer_training(long),
        "rates": rates(long),
    }


def compared(found: Finished) -> bytes:
    """Plot the ratios of the verdict: a panel for each, a dot for each task, the mean on top."""
    figure = _figure(7.0, 3.7)
    for place, what in enumerate(("test loss", KEPT)):
        axes = figure.add_subplot(1, 2, place + 1)
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
        axes.set_title(f"{what},\ndivided by LoRA's", fontsize=10)
        axes.tick_params(labelsize=11)
        axes.grid(alpha=0.3, axis="x")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=10)
    return _svg(figure)


def longer_training(found: Longer) -> bytes:
    """Plot the lowest loss of each method at each forgetting, and every run as it was trained."""
    figure = _figure(7.0, 4.8)
    axes = figure.add_subplot(1, 1, 1)
    for name in found.records:
        colour, line = STYLES[name]
        best = [(limit, found.at(name, limit)[0]) for limit in SHOWN]
        axes.plot(*zip(*best, strict=True), color=colour, linestyle=line, label=METHODS[name].title)
        ends = [end for rate in found.records[name] for end in found.ends(name, rate)]
        dots = [(end.forgetting, end.loss) for end in ends]
        axes.plot(*zip(*dots, strict=True), color=colour, linestyle="", marker="o", alpha=0.6)
    axes.set_xlim(0, SHOWN[-1])
    axes.set_ylim(2.48, 2.92)  # else one bad run flattens it
    axes.set_xlabel("forgetting", fontsize=11)
    axes.set_ylabel("test loss", fontsize=11)
    axes.set_title("lines: best of all rates and scales; dots: runs of all seeds", fontsize=11)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=10)
    return _svg(figure)


def rates(found: Longer) -> bytes:
    """Plot the test loss and the forgetting of MiSS and LoRA over the learning rate."""
    figure = _figure(7.0, 3.6)
    learned, forgot = (figure.add_subplot(1, 2, panel + 1) for panel in range(2))
    for name in ("bone", OTHER):
        colour, line = STYLES[name]
        tried = [(rate, found.mean(name, rate)) for rate in found.records[name]]
        style = {"color": colour, "linestyle": line, "marker": "o", "label": METHODS[name].title}
        learned.plot([rate for rate, _ in tried], [end.loss for _, end in tried], **style)
        forgot.plot([rate for rate, _ in tried], [end.forgetting for _, end in tried], **style)
    for axes, what in ((learned, "test loss"), (forgot, "forgetting")):
        axes.set_xscale("log")
        axes.set_xlabel("learning rate", fontsize=11)
        axes.set_title(f"{what}, lower is better", fontsize=11)
        axes.tick_params(labelsize=10)
        axes.grid(alpha=0.3)
    learned.set_ylim(2.48, 2.92)  # else one bad run flattens it
    learned.legend(fontsize=10)
    return _svg(figure)


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": "disha"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, facecolor="white")
    lines = buffer.getvalue().decode("utf-8").splitlines()
    return ("\n".join(line.rstrip() for line in lines) + "\n").encode("utf-8")
