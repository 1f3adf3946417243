"""What a user cares for first: time and memory / those of PEFT's LoRA, in five lines.

Each row is a figure of the results. Ratios of times are taken round by round. Bytes that are
counted have no spread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.candidates import CANDIDATES
from benchmarks.markdown import count_text
from benchmarks.protocol import Spread, paired_ratios

__all__ = ["SHOWN", "Row", "lines", "rows"]

Case = Mapping[str, Any]
Tables = Mapping[str, Sequence[Case]]

SHOWN = ("bone", "bat", "peft_miss")
OTHER = "peft_lora"
CONTESTANTS = {"bone": "disha", "bat": "disha_bat", "peft_miss": "peft_miss", OTHER: OTHER}
"""A candidate -> who trains with it in the contest of whole jobs."""


@dataclass(frozen=True)
class Row:
    """A figure that is compared with that of PEFT's LoRA.

    Args:
        line: to which of the five lines it belongs.
        label: what it is.
        ratios: candidate -> its ratio to PEFT's LoRA.
    """

    line: str
    label: str
    ratios: Mapping[str, Spread]


def rows(tables: Tables) -> list[Row]:
    """Return the figures that the tables have, in the order of the page.

    Args:
        tables: of files of results.
    """
    found = (make(tables) for make in ROWS)
    return [row for row in found if row is not None and row.ratios]


def lines(found: Sequence[Row]) -> list[str]:
    """Return each line as a sentence: its name, and what was measured of whom.

    Args:
        found: the figures.
    """
    return [
        f"**{line}.** " + " ".join(_said(row) for row in found if row.line == line)
        for line in dict.fromkeys(row.line for row in found)
    ]


def _said(row: Row) -> str:
    told = (
        f"{CANDIDATES[name].title.removeprefix('disha ')} {_short(ratio)}"
        for name, ratio in row.ratios.items()
    )
    label = row.label[0].upper() + row.label[1:]
    return f"{label}: {', '.join(told)}."


def _short(ratio: Spread) -> str:
    """Return a ratio with two decimals, and its quartiles if they differ."""
    said = f"{ratio.median:.2f}"
    return said if ratio.low == ratio.high else f"{said} ({ratio.low:.2f} to {ratio.high:.2f})"


def _compared(values: Mapping[str, Sequence[float]], names: Mapping[str, str]) -> dict[str, Spread]:
    """Return candidate -> ratio, for names by which a case knows the candidates."""
    return {
        name: Spread.of(paired_ratios(values, names[name], names[OTHER]))
        for name in SHOWN
        if {names[name], names[OTHER]} <= set(values)
    }


def _same_names(suffix: str = "") -> dict[str, str]:
    return {name: name + suffix for name in (*SHOWN, OTHER)}


def _counted(values: Mapping[str, float]) -> dict[str, Spread]:
    return _compared({name: [count] for name, count in values.items()}, _same_names())


def _first(tables: Tables, table: str, **where: Any) -> Case | None:
    """Return the first case that has these values, and times or bytes of PEFT's LoRA."""
    cases = tables.get(table, ())
    fits = (case for case in cases if all(case.get(key) == one for key, one in where.items()))
    return next(fits, None)


def _job(line: str, field: str) -> Callable[[Tables], Row | None]:
    def make(tables: Tables) -> Row | None:
        case = _first(tables, "side_by_side", what="contest")
        if case is None:
            return None
        took = {name: one[field] for name, one in case["contestants"].items()}
        return Row(line, "whole job", _compared(took, CONTESTANTS))

    return make


def _padded_job(tables: Tables) -> Row | None:
    case = _first(tables, "side_by_side", what="contest")
    if case is None or "disha_padded" not in case["contestants"]:
        return None
    took = {name: one["seconds_per_step"] for name, one in case["contestants"].items()}
    names = {**CONTESTANTS, "bone": "disha_padded", "peft_miss": "-"}
    return Row(TIME, "whole job, with Trainer's padding", _compared(took, names))


def _kept(tables: Tables) -> Row | None:
    case = _first(tables, "memory", what="counted")
    if case is None:
        return None
    label = f"kept for backward by {count_text(case['layers'], 'layer')}"
    return Row(MEMORY, label, _counted(case["kept_bytes"]))


def _model_step(tables: Tables) -> Row | None:
    case = _first(tables, "model_step")
    if case is None:
        return None
    return Row(TIME, "model alone", _compared(case["seconds"], _same_names()))


def _experts(label: str, figures: Callable[[Case], dict[str, Spread]]) -> Any:
    def make(tables: Tables) -> Row | None:
        case = _first(tables, "experts", implementation="grouped_mm")
        if case is None:
            return None
        return Row(f"{case['model']}, {case['experts']} experts", label, figures(case))

    return make


def _one_token(tables: Tables) -> Row | None:
    case = _first(tables, "few_tokens", tokens=1)
    if case is None:
        return None
    return Row(SERVING, "forward of one token", _compared(case["seconds"], _same_names()))


def _many_adapters(tables: Tables) -> Row | None:
    cases = [case for case in tables.get("routed", ()) if case["adapters"] > 1]
    if not cases:
        return None
    case = max(cases, key=lambda one: (one["adapters"], -one["tokens"]))
    label = f"a batch with {case['adapters']} adapters"
    return Row(SERVING, label, _compared(case["seconds"], _same_names("_routed")))


def _start(tables: Tables) -> Row | None:
    cases = [case for case in tables.get("start_up", ()) if "Llama" in case["what"]]
    if not cases:
        return None
    return Row("Start", "adapt a 7B Llama", _compared(cases[0]["seconds"], _same_names()))


MEMORY, TIME, SERVING = "Memory in training", "Time of a training step", "Serving unmerged"
ROWS: Sequence[Callable[[Tables], Row | None]] = (
    _job(MEMORY, "peak_bytes"),
    _kept,
    _job(TIME, "seconds_per_step"),
    _padded_job,
    _model_step,
    _experts("step", lambda case: _compared(case["seconds"], _same_names())),
    _experts("kept for backward", lambda case: _counted(case["kept_bytes"])),
    _one_token,
    _many_adapters,
    _start,
)
