"""The tables of speed and memory, in Markdown, from files of results. Pages have the prose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.candidates import BASE, CANDIDATES
from benchmarks.markdown import (
    NOTHING,
    Case,
    bytes_text,
    count_text,
    divided_text,
    median_text,
    ratio_text,
    run_text,
    seconds_text,
    short_text,
    size_text,
    spread_text,
    table,
)
from benchmarks.protocol import COMPILED, Spread, paired_ratios
from benchmarks.roofline import floor
from benchmarks.side_by_side import CONTESTANTS, PARTS

Results = Mapping[str, Any]
Cases = Sequence[Case]

OTHER = "peft_lora"
"""What the summary divides by."""
WITH_ROOFLINE = ("layer_step", "model_step", "few_tokens", "step")


def tables(files: Sequence[Results]) -> dict[str, str]:
    """Return name -> table, each of the first file that has its cases, and the runs."""
    found: dict[str, str] = {}
    cases = newest(files)
    for name in cases:
        for suffix, make in TABLES[name].items():
            found[name + suffix] = make(cases[name])
    summary = compared(cases)
    if summary:
        found["compared"] = compared_table(summary)
    found["runs"] = runs(files)
    return found


def newest(files: Iterable[Results]) -> dict[str, Cases]:
    """Return the cases of each table of the first file that has it."""
    found: dict[str, Cases] = {}
    for results in files:
        found = {**results["tables"], **found}
    return found


def runs(files: Sequence[Results]) -> str:
    """Return when and where each table was measured, and what failed."""
    lines = []
    taken: set[str] = set()
    for results in files:
        names = [name for name in results["tables"] if name not in taken]
        taken.update(names)
        if names:
            lines.append(f"- {', '.join(names)}: {run_text(results)}")
        lines += [f"- {name} failed: {why}" for name, why in results.get("failed", {}).items()]
        for name in names:
            for case in results["tables"][name]:
                missing = case.get("missing", {})
                lines += [f"- {name}, {one} failed: {why}" for one, why in missing.items()]
    return "\n".join(lines) + "\n"


# --- times divided by those of the frozen base, and bytes ----------------------------------------


def title_of(name: str) -> str:
    return CANDIDATES[name].title


def eager_names(case: Case) -> list[str]:
    """Return the candidates of a case, in their order."""
    return [name for name in case["seconds"] if not name.endswith(COMPILED)]


def times(name: str, suffix: str = "") -> Callable[[Cases], str]:
    """Return a table: candidates by cases, the time of the base, and the roofline if there is one.

    With a suffix, all times are those of compiled runs.
    """

    def make(cases: Cases) -> str:
        base = BASE + suffix
        rows = [["frozen", *(median_text(case, base) for case in cases)]]
        if name in WITH_ROOFLINE and not suffix:
            for method in ("bone", "bat"):
                floors = [f"*{ratio_text(floor(name, case, method))}*" for case in cases]
                rows.append([f"*roofline {short_title(method)}*", *floors])
        for one in eager_names(cases[0]):
            if one != BASE:
                ratios = [divided_text(case, one + suffix, base) for case in cases]
                rows.append([title_of(one), *ratios])
        return table(["", *map(size_text, cases)], rows)

    return make


def bytes_of(figure: str) -> Callable[[Cases], str]:
    """Return a table of bytes: candidates by the cases that have them."""

    def make(cases: Cases) -> str:
        rows = []
        cases = [case for case in cases if figure in case]
        for name in eager_names(cases[0]):
            counts = [case[figure].get(name) for case in cases]
            shown = [NOTHING if count is None else bytes_text(count) for count in counts]
            rows.append([title_of(name), *shown])
        return table(["", *map(size_text, cases)], rows)

    return make


def short_title(name: str) -> str:
    return title_of(name).removeprefix("disha ")


def memory(cases: Cases) -> str:
    (case,) = cases
    rows = [
        [title_of(name), bytes_text(kept), bytes_text(case["peak_bytes"][name])]
        for name, kept in case["kept_bytes"].items()
    ]
    return table(["", "kept", "peak"], rows)


def start_up(cases: Cases) -> str:
    (case,) = cases
    names = list(case["seconds"])
    row = [case["what"], *(median_text(case, name) for name in names)]
    return table(["", *map(title_of, names)], [row])


def routed(cases: Cases) -> str:
    ways = {"routed": "one batch", "one_by_one": "one by one"}
    rows = [
        [
            f"{title_of(name)}, {text}",
            *(divided_text(case, f"{name}_{way}", BASE) for case in cases),
        ]
        for name in ("bone", "bat", OTHER)
        for way, text in ways.items()
    ]
    header = [
        f"{count_text(case['adapters'], 'adapter')}, {count_text(case['tokens'], 'token')}"
        for case in cases
    ]
    return table(["", *header], rows)


def many(cases: Cases) -> str:
    """Return the time of k adapters one after the other, divided by that of all at once."""
    rows = []
    for case in cases:
        adapters, rows_of_each = case["adapters"], case["rows"]
        ratios = [
            divided_text(case, name, to)
            for name, to in (
                ("bone_at_once", "bone_one_adapter"),
                ("bone_one_by_one", "bone_at_once"),
                ("bone_one_by_one", "bone_one_adapter"),
                ("peft_miss_one_by_one", "bone_at_once"),
                ("lora_at_once", "lora_one_adapter"),
                ("lora_one_by_one", "lora_at_once"),
                ("peft_lora_one_by_one", "lora_at_once"),
            )
        ]
        counts = f"{count_text(adapters, 'adapter')}, {count_text(rows_of_each, 'row')} each"
        rows.append([counts, *ratios])
    return table(MANY_HEADER, rows)


MANY_HEADER = (
    "",
    "MiSS: at once / one adapter",
    "one by one / at once",
    "one by one / one adapter",
    "PEFT MiSS one by one / at once",
    "LoRA: at once / one adapter",
    "one by one / at once",
    "PEFT LoRA one by one / at once",
)


def many_memory(cases: Cases) -> str:
    """Return the memory of each adapter: its share of the base, and what its rows keep."""
    rows = []
    for case in cases:
        adapters, kept, base = case["adapters"], case["kept_bytes"], case["base_bytes"]
        counts = f"{count_text(adapters, 'adapter')}, {count_text(case['rows'], 'row')} each"
        rows.append(
            [
                counts,
                bytes_text((kept["bone_at_once"] + base) // adapters),
                bytes_text((kept["lora_at_once"] + base) // adapters),
                *(
                    bytes_text(kept[f"{name}_one_by_one"] + base)
                    for name in ("bone", "lora", "peft_miss", "peft_lora")
                ),
            ]
        )
    one_by_one = ("disha MiSS", "disha LoRA", "PEFT MiSS", "PEFT LoRA")
    header = ["", "disha MiSS, at once", "disha LoRA, at once"]
    return table([*header, *(f"{title}, a process each" for title in one_by_one)], rows)


def passes(cases: Cases) -> str:
    rows = [
        [name, *(divided_text(case, name, BASE) for case in cases)]
        for name in cases[0]["seconds"]
        if name != BASE
    ]
    return table(["", *map(size_text, cases)], rows)


def experts(cases: Cases) -> str:
    names = eager_names(cases[0])
    rows = [
        [
            f"{case['model']}, {case['experts']} experts of {case['hidden']} x {case['inner']}, "
            f"{count_text(case['tokens'], 'token')}, {case['implementation']}",
            median_text(case, BASE),
            *(divided_text(case, name, BASE) for name in names[1:]),
            *(bytes_text(case["kept_bytes"][name]) for name in names),
        ]
        for case in cases
    ]
    titles = ["frozen", *map(title_of, names[1:])]
    return table(["", *titles, *(f"kept: {title}" for title in titles)], rows)


def works(base: str, title: Callable[[Case], str]) -> Callable[[Cases], str]:
    """Return a table of forwards and steps, each eager and compiled if it was, divided by a run."""

    def make(cases: Cases) -> str:
        rows = []
        suffixes = ["", COMPILED] if base + COMPILED in cases[0]["seconds"] else [""]
        for name in eager_names(cases[0]):
            ratios = [
                divided_text(case, name + suffix, base + suffix)
                for case in cases
                for suffix in suffixes
            ]
            rows.append([title_of(name), *ratios])
        header = [
            title(case) + (", compiled" if suffix else "") for case in cases for suffix in suffixes
        ]
        return table(["", *header], rows)

    return make


def work_text(case: Case) -> str:
    """Return what is done in a case: step, 2048 wide."""
    return f"{case['work']}, {case['width']} wide"


def sized_work_text(case: Case) -> str:
    """Return what is done in a case: step, 2048 wide, 512 tokens, float32."""
    return f"{case['work']}, {size_text(case)}"


def kept_by_width(cases: Cases) -> str:
    of_width = {case["width"]: case for case in cases}
    rows = [
        [title_of(name), *(bytes_text(case["kept_bytes"][name]) for case in of_width.values())]
        for name in cases[0]["kept_bytes"]
    ]
    return table(["", *(f"kept, {width} wide" for width in of_width)], rows)


# --- side by side in one trainer -----------------------------------------------------------------

BESIDE = {"seconds": "seconds", "pass_bytes": "pass"}
"""The figures of a contestant, and what the tables call them."""


def beside(case: Case, one: str, other: str) -> list[str]:
    """Return the ratios of two contestants; those of sums where their batches differ."""
    shown = []
    for figure in BESIDE:
        first, second = (case["contestants"][name][figure] for name in (one, other))
        if not isinstance(first, list):
            ratios = [first / second]
        elif CONTESTANTS[one].grouped != CONTESTANTS[other].grouped:
            ratios = [sum(first) / sum(second)]
        else:
            ratios = [a / b for a, b in zip(first, second, strict=True)]
        shown.append(spread_text(Spread.of(ratios)))
    return shown


def adapter(cases: Cases) -> str:
    rows = [
        [f"{case['dtype']}, {CONTESTANTS[name].title}", *beside(case, name, "sft_lora")]
        for case in cases
        for name in case["contestants"]
    ]
    return table(["", *BESIDE.values()], rows)


def job(cases: Cases) -> str:
    (case,) = cases
    rows = [[part, *beside(case, one, other)] for part, (one, other) in PARTS.items()]
    return table(["", *BESIDE.values()], rows)


# --- an accelerator ------------------------------------------------------------------------------


def finetune(cases: Cases) -> str:
    (case,) = cases
    first, *_, last = case["losses"].values()
    peak = case["peak_bytes"]
    figures = {
        "model": case["model"],
        "steps": f"{case['steps']:,}",
        "time": seconds_text(case["seconds"]),
        "loss before": f"{first:.3f}",
        "loss after": f"{last:.3f}",
        "loss of the saved file in the base loaded anew": f"{case['proof']['loaded']:.3f}",
        "peak of the allocator": NOTHING if peak is None else bytes_text(peak),
        **{name: str(value) for name, value in case["settings"].items()},
    }
    return table(["", "`disha finetune`"], [[name, value] for name, value in figures.items()])


def tests(cases: Cases) -> str:
    (case,) = cases
    rows = [["`pytest -m cuda`", case["said"]]]
    rows += [["", line] for line in case["not_passed"]]
    return table(["tests", "on this device"], rows)


# --- the summary: figures divided by those of PEFT's LoRA ----------------------------------------

SHOWN = {
    "bone": ("D", "tab:blue"),
    "bat": ("s", "tab:purple"),
    "peft_miss": ("o", "tab:gray"),
}
"""The candidates that the summary compares with PEFT's LoRA, and their marks in its picture."""


class Row(NamedTuple):
    """A figure that is compared with that of PEFT's LoRA: a line, a label, candidate -> ratio."""

    line: str
    label: str
    ratios: Mapping[str, Spread]


TRAINING, SERVING = "One training step", "Serving unmerged"
GROUPED = {"implementation": "grouped_mm"}
COMPARED: Sequence[tuple[str, str, str, Mapping[str, Any], str, str]] = (
    ("Memory", "activations kept by {layers} layers", "memory", {}, "kept_bytes", ""),
    (TRAINING, "SmolLM2-135M, float32", "model_step", {"dtype": "float32"}, "seconds", ""),
    (TRAINING, "SmolLM2-135M, bfloat16", "model_step", {"dtype": "bfloat16"}, "seconds", ""),
    ("Experts", "{model}, step", "experts", GROUPED, "seconds", ""),
    ("Experts", "{model}, activations kept", "experts", GROUPED, "kept_bytes", ""),
    (SERVING, "one token", "few_tokens", {"tokens": 1}, "seconds", ""),
    (SERVING, "{tokens} tokens, {adapters} adapters", "routed", {"adapters": 64, "tokens": 64},
     "seconds", "_routed"),
    (SERVING, "{tokens:,} tokens, {adapters} adapters", "routed", {"adapters": 64, "tokens": 2048},
     "seconds", "_routed"),
    ("Start", "adapt a 7B Llama", "start_up", {}, "seconds", ""),
)  # fmt: skip
"""Line, label, table, values of the case, its figure, and what the candidates' names end in."""


def compared(cases_of: Mapping[str, Cases]) -> list[Row]:
    """Return the figures that the tables have, in the order of the page."""
    found = []
    for line, label, name, where, figure, suffix in COMPARED:
        cases = [one for one in cases_of.get(name, ()) if where.items() <= one.items()]
        if cases:
            ratios = _over_lora(cases[0][figure], suffix)
            found.append(Row(line, label.format(**cases[0]), ratios))
    return found


def _over_lora(values: Mapping[str, Any], suffix: str) -> dict[str, Spread]:
    listed = {}
    for name, value in values.items():
        listed[name] = value if isinstance(value, list) else [value]
    return {
        name: Spread.of(paired_ratios(listed, name + suffix, OTHER + suffix))
        for name in SHOWN
        if name + suffix in listed
    }


def compared_table(rows: Sequence[Row]) -> str:
    """Return the summary as a table."""
    names = [name for name in SHOWN if any(name in row.ratios for row in rows)]
    shown = [
        [
            f"{row.line}: {row.label}",
            *(short_text(row.ratios[name]) if name in row.ratios else NOTHING for name in names),
        ]
        for row in rows
    ]
    return table(["divided by PEFT's LoRA", *map(title_of, names)], shown)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Plot each figure of the summary: a dot for a candidate, its quartiles."""
    from matplotlib.figure import Figure

    names = [name for name in SHOWN if any(name in row.ratios for row in rows)]
    figure = Figure(figsize=(6.2, 1.0 + 0.36 * len(rows)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        if place and row.line != rows[place - 1].line:
            axes.axhline(place - 0.5, color="lightgray", linewidth=0.8)
        for name, ratio in row.ratios.items():
            mark, colour = SHOWN[name]
            height = place + 0.2 * (names.index(name) - 1)  # so that none hides another
            axes.plot([ratio.low, ratio.high], [height, height], color=colour, linewidth=1.5)
            axes.plot(ratio.median, height, mark, color=colour, markersize=6)
    for name in names:
        mark, colour = SHOWN[name]
        axes.plot([], [], mark, color=colour, label=title_of(name))
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_yticks(range(len(rows)), [f"{row.line}:\n{row.label}" for row in rows])
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.3, axis="x")
    axes.set_xlabel("divided by PEFT's LoRA; lower is better", fontsize=9)
    figure.legend(loc="outside lower center", ncols=len(names), fontsize=9)
    figure.savefig(path, format="png", metadata={"Software": None})


TABLES: Mapping[str, Mapping[str, Callable[[Cases], str]]] = {
    "memory": {"": memory},
    "layer_step": {"": times("layer_step")},
    "model_step": {"": times("model_step")},
    "few_tokens": {"": times("few_tokens")},
    "adapter": {"": adapter},
    "job": {"": job},
    "experts": {"": experts},
    "routed": {"": routed},
    "many": {"": many, "_memory": many_memory},
    "passes": {"": passes},
    "start_up": {"": start_up},
    "groups": {"": works("bone", work_text), "_kept": kept_by_width},
    "loras": {"": works(BASE, sized_work_text), "_kept": bytes_of("kept_bytes")},
    "tests": {"": tests},
    "step": {
        "": times("step"),
        "_compiled": times("step", COMPILED),
        "_peak": bytes_of("peak_bytes"),
    },
    "decoding": {"": times("decoding"), "_compiled": times("decoding", COMPILED)},
    "model": {
        "": times("model"),
        "_compiled": times("model", COMPILED),
        "_peak": bytes_of("peak_bytes"),
    },
    "finetune": {"": finetune},
}
"""Cases in a file of results -> how the name of a table ends -> the table."""
