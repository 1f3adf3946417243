"""The picture of a file of results, as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence

from benchmarks.candidates import CANDIDATES
from benchmarks.report import SHOWN, Row

__all__ = ["compared_picture"]

MARKS = {"bone": ("D", "tab:blue"), "bat": ("s", "tab:purple"), "peft_miss": ("o", "tab:gray")}


def compared_picture(rows: Sequence[Row]) -> bytes:
    """Plot each figure that is compared with PEFT's LoRA: a dot for a candidate, its quartiles."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 1.0 + 0.36 * len(rows)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        if place and row.line != rows[place - 1].line:
            axes.axhline(place - 0.5, color="lightgray", linewidth=0.8)
        for name, ratio in row.ratios.items():
            mark, colour = MARKS[name]
            height = place + 0.2 * (SHOWN.index(name) - 1)  # so that none hides another
            axes.plot([ratio.low, ratio.high], [height, height], color=colour, linewidth=1.5)
            axes.plot(ratio.median, height, mark, color=colour, markersize=6)
    for name in SHOWN:
        mark, colour = MARKS[name]
        axes.plot([], [], mark, color=colour, label=CANDIDATES[name].title)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_yticks(range(len(rows)), [f"{row.line}:\n{row.label}" for row in rows])
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.3, axis="x")
    axes.set_xlabel("divided by PEFT's LoRA; lower is better", fontsize=9)
    figure.legend(loc="outside lower center", ncols=len(SHOWN), fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
