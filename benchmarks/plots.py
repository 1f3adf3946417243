"""Plots of a file of results, as PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.candidates import BASE, CANDIDATES
from benchmarks.compared import SHOWN, Row, rows
from benchmarks.targets import candidate_floor, over_base, roofline_floor, size_title

__all__ = ["plots"]

Case = Mapping[str, Any]

OURS, THEIRS, PLAIN = "tab:blue", "tab:gray", "black"
MARKS = {"bone": ("D", OURS), "bat": ("s", "tab:purple"), "peft_miss": ("o", THEIRS)}


def plots(tables: Mapping[str, Sequence[Case]]) -> dict[str, bytes]:
    """Return file name -> PNG for the given tables.

    Args:
        tables: of a file of results.
    """
    drawn = {}
    if rows(tables):
        drawn["compared.png"] = _compared(rows(tables))
    for table, title in (
        ("layer_step", "training step of one layer"),
        ("model_step", "training step of the language model"),
    ):
        if tables.get(table):
            drawn[f"{table}.png"] = _bars(table, tables[table], f"{title} / frozen base")
    if tables.get("few_tokens"):
        drawn["few_tokens.png"] = _few_tokens(tables["few_tokens"])
    counted = [case for case in tables.get("memory", ()) if case["what"] == "counted"]
    if counted:
        drawn["memory.png"] = _memory(counted[0])
    return drawn


def _compared(found: Sequence[Row]) -> bytes:
    """Plot each figure that is compared with PEFT's LoRA: a dot for a candidate, its quartiles."""
    figure = _figure(6.2, 1.0 + 0.36 * len(found))
    axes = figure.add_subplot()
    for place, row in enumerate(found):
        if place and row.line != found[place - 1].line:
            axes.axhline(place - 0.5, color="lightgray", linewidth=0.8)
        for name, ratio in row.ratios.items():
            mark, colour = MARKS[name]
            height = place + 0.2 * (list(SHOWN).index(name) - 1)  # so that none hides another
            axes.plot([ratio.low, ratio.high], [height, height], color=colour, linewidth=1.5)
            axes.plot(ratio.median, height, mark, color=colour, markersize=6)
    for name in SHOWN:
        mark, colour = MARKS[name]
        axes.plot([], [], mark, color=colour, label=CANDIDATES[name].title)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlim(left=0)
    labels = [f"{row.line}:\n{row.label}" for row in found]
    axes.set_yticks(range(len(found)), labels)
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.3, axis="x")
    axes.set_xlabel("divided by PEFT's LoRA; lower is better", fontsize=9)
    figure.legend(loc="outside lower center", ncols=len(SHOWN), fontsize=9)
    return _png(figure)


def _bars(table: str, cases: Sequence[Case], label: str) -> bytes:
    figure = _figure(4.2 * len(cases), 4.0)
    for place, case in enumerate(cases):
        axes = figure.add_subplot(1, len(cases), place + 1)
        names = [name for name in case["seconds"] if name != BASE]
        spreads = [over_base(case, name) for name in names]
        axes.barh(
            [CANDIDATES[name].title for name in names],
            [spread.median for spread in spreads],
            xerr=[
                [spread.median - spread.low for spread in spreads],
                [spread.high - spread.median for spread in spreads],
            ],
            color=[_colour(name) for name in names],
        )
        for row, name in enumerate(names):
            for floor_of, style in ((candidate_floor, "-"), (roofline_floor, ":")):
                floor = floor_of(table, case, CANDIDATES[name].method)
                if floor is not None:
                    axes.plot([floor, floor], [row - 0.4, row + 0.4], style, color="tab:red")
        axes.invert_yaxis()
        axes.set_xlim(left=0.9)
        axes.set_title(size_title(case), fontsize=9)
        axes.set_xlabel(label + "\nred: multiply-adds; dotted: roofline", fontsize=8)
        axes.tick_params(labelsize=8)
    return _png(figure)


def _few_tokens(cases: Sequence[Case]) -> bytes:
    dtypes = list(dict.fromkeys(case["dtype"] for case in cases))
    figure = _figure(5.5 * len(dtypes), 4.5)
    for place, dtype in enumerate(dtypes):
        mine = [case for case in cases if case["dtype"] == dtype]
        axes = figure.add_subplot(1, len(dtypes), place + 1)
        for name in mine[0]["seconds"]:
            if name == BASE or any(name not in case["seconds"] for case in mine):
                continue
            axes.plot(
                [case["tokens"] for case in mine],
                [over_base(case, name).median for case in mine],
                marker="o",
                linestyle="-" if CANDIDATES[name].package is None else "--",
                label=CANDIDATES[name].title,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        tokens = [case["tokens"] for case in mine]
        axes.set_xticks(tokens, [str(count) for count in tokens])
        axes.set_title(f"{mine[0]['width']} wide, {dtype}", fontsize=9)
        axes.set_xlabel("tokens")
        axes.set_ylabel("forward / frozen base")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=7)
    return _png(figure)


def _memory(case: Case) -> bytes:
    figure = _figure(8, 4)
    for place, (key, label) in enumerate(
        (("kept_bytes", "kept for backward"), ("peak_bytes", "allocated at the peak of a step"))
    ):
        axes = figure.add_subplot(1, 2, place + 1)
        names = list(case[key])
        axes.barh(
            [CANDIDATES[name].title for name in names],
            [case[key][name] / 2**20 for name in names],
            color=[_colour(name) for name in names],
        )
        axes.invert_yaxis()
        axes.set_xlabel(f"{label} (MiB)", fontsize=8)
        axes.tick_params(labelsize=8)
    return _png(figure)


def _colour(name: str) -> str:
    return PLAIN if name == BASE else OURS if CANDIDATES[name].package is None else THEIRS


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
