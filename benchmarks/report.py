"""`python -m benchmarks.report FILES`: write tables, a picture, and the box on top of a page.

The box stands between two marks in docs/performance.md. Every number comes from a file. A table is
taken from the first file that has it, so name the newest file first.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.candidates import BASE, CANDIDATES
from benchmarks.compiled import COMPILED
from benchmarks.groups import WITH_GROUPS
from benchmarks.markdown import (
    Case,
    box,
    bytes_text,
    count_text,
    divided_text,
    median_text,
    ratio_text,
    replace_between,
    run_text,
    seconds_text,
    short_text,
    size_text,
    spread_text,
    table,
)
from benchmarks.protocol import Spread, paired_ratios
from benchmarks.results import read_results
from benchmarks.roofline import floor
from benchmarks.side_by_side import CONTESTANTS, PARTS

Results = Mapping[str, Any]
Tables = Mapping[str, Sequence[Case]]

PAGE, PICTURE = "docs/performance.md", "docs/assets/compared.png"
TABLES = "benchmarks/results/speed.md"
MARKS = ("<!-- written by python -m benchmarks.report -->\n\n", "\n<!-- end of what it writes -->")
"""What stands before and after the box on its page."""
OTHER = "peft_lora"
SHOWN = {"bone": ("D", "tab:blue"), "bat": ("s", "tab:purple"), "peft_miss": ("o", "tab:gray")}
"""The candidates that the box and the picture compare with LoRA, and their marks."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the box, the tables and the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument(
        "results", type=Path, nargs="+", help="files of `python -m benchmarks`, the newest first"
    )
    parser.add_argument("--root", type=Path, default=Path(), help="folder of docs and benchmarks")
    asked = parser.parse_args(arguments)
    files = [read_results(path) for path in asked.results]
    for name in (PAGE, PICTURE, TABLES):
        (asked.root / name).parent.mkdir(parents=True, exist_ok=True)
    rows = compared(_tables(files))
    picture(rows, asked.root / PICTURE)
    path = asked.root / PAGE
    shown = path.read_text(encoding="utf-8") if path.exists() else "".join(MARKS)
    path.write_text(replace_between(shown, summary(rows), *MARKS), encoding="utf-8")
    (asked.root / TABLES).write_text(page(files), encoding="utf-8")
    print(path, asked.root / TABLES)


def _tables(files: Iterable[Results]) -> dict[str, Sequence[Case]]:
    """Return each table of the first file that has it."""
    found: dict[str, Sequence[Case]] = {}
    for results in files:
        found = {**results["tables"], **found}
    return found


def page(files: Sequence[Results]) -> str:
    """Return the page in Markdown."""
    tables = _tables(files)
    sources = {}
    for name in SECTIONS:
        holding = [results for results in files if name in results["tables"]]
        if holding:
            sources[name] = holding[0]
    used = [results for results in files if any(results is one for one in sources.values())]
    sections = []
    for name, results in sources.items():
        told = ""
        if len(used) > 1:
            told = f"*Run {used.index(results) + 1}.* "
        sections.append(SECTIONS[name](tables[name]).replace("\n\n", f"\n\n{told}", 1))
    listed = "".join(f"{number}. {run_text(results)}\n" for number, results in enumerate(used, 1))
    return "\n".join(
        [
            "# Speed and memory: all tables\n",
            "[Speed and memory](../../docs/performance.md) has what to expect.\n",
            HOW_TO_READ,
            *sections,
            f"## The runs\n\n{ABOUT_RUNS}\n\n{listed}",
        ]
    )


HOW_TO_READ = """\
## How it is measured

All candidates run in one process, in rounds, each round in a new random order.
A ratio is taken within a round. The tables have the median over the rounds, and half the distance
of the quartiles after the sign ±. *Frozen* is the same layer or model without an adapter; gradients
pass through it. All candidates have as many trained parameters as MiSS with r = 64, and
adapters of the base's dtype. Each must change the output and get gradients before it is timed. The
*roofline* is the lowest ratio that the machine allows: it adds up the time of each product and of
each pass over memory, at speeds that are measured beside the steps
([how](../roofline.py)).
"""
ABOUT_RUNS = """\
`python -m benchmarks.report` writes this page from the results of `make bench` and
`python -m benchmarks.side_by_side`, which lie beside it. Nothing ran on a GPU, and
no model that was trained has more than 135M parameters."""


# --- the box and the picture: figures / those of PEFT's LoRA -------------------------------------


class Row(NamedTuple):
    """A figure that is compared with that of PEFT's LoRA: a line, a label, candidate -> ratio."""

    line: str
    label: str
    ratios: Mapping[str, Spread]


def compared(tables: Tables) -> list[Row]:
    """Return the figures that the tables have, in the order of the page."""
    found = []
    for line, label, name, where, figure, suffix in COMPARED:
        cases = [one for one in tables.get(name, ()) if where.items() <= one.items()]
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
    ("Start", "adapt a 7B Llama", "start_up", {"what": "plan and inject a 7B Llama, meta"},
     "seconds", ""),
)  # fmt: skip
"""Line, label, table, values of the case, its figure, and what the candidates' names end in."""


def summary(rows: Sequence[Row]) -> str:
    """Return the box on top of docs/performance.md."""
    told: dict[str, list[str]] = {}
    for row in rows:
        label = row.label[0].upper() + row.label[1:]
        ratios = [f"{_title(name)} {short_text(ratio)}" for name, ratio in row.ratios.items()]
        told.setdefault(row.line, []).append(f"{label}: {', '.join(ratios)}.")
    lines = [f"- **{line}.** {' '.join(texts)}" for line, texts in told.items()]
    text = "\n".join([*lines, ABOUT_LINES])
    return box("Time and memory, divided by those of PEFT's LoRA", text)


def _title(name: str) -> str:
    return CANDIDATES[name].title.removeprefix("disha ")


ABOUT_LINES = """
Less than 1 is better than LoRA. MiSS and BAT without a name before them are those of
`disha`. Brackets have the quartiles of the rounds."""


def picture(rows: Sequence[Row], path: Path) -> None:
    """Plot each figure of the box: a dot for a candidate, its quartiles."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 1.0 + 0.36 * len(rows)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        if place and row.line != rows[place - 1].line:
            axes.axhline(place - 0.5, color="lightgray", linewidth=0.8)
        for name, ratio in row.ratios.items():
            mark, colour = SHOWN[name]
            height = place + 0.2 * (list(SHOWN).index(name) - 1)  # so that none hides another
            axes.plot([ratio.low, ratio.high], [height, height], color=colour, linewidth=1.5)
            axes.plot(ratio.median, height, mark, color=colour, markersize=6)
    for name, (mark, colour) in SHOWN.items():
        axes.plot([], [], mark, color=colour, label=CANDIDATES[name].title)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_yticks(range(len(rows)), [f"{row.line}:\n{row.label}" for row in rows])
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.3, axis="x")
    axes.set_xlabel("divided by PEFT's LoRA; lower is better", fontsize=9)
    figure.legend(loc="outside lower center", ncols=len(SHOWN), fontsize=9)
    figure.savefig(path, format="png", metadata={"Software": None})


# --- one section for each table ------------------------------------------------------------------


def _section(title: str, about: str, *tables: str) -> str:
    return f"## {title}\n\n{about}\n\n{chr(10).join(tables)}"


def _timed(name: str, title: str, about: str) -> Callable[[Sequence[Case]], str]:
    """Return a section with candidates by cases, the roofline, and the time of the base."""

    def section(cases: Sequence[Case]) -> str:
        rows = [["frozen", *(median_text(case, BASE) for case in cases)]]
        for method in ("bone", "bat"):
            told = [f"*{ratio_text(floor(name, case, method))}*" for case in cases]
            rows.append([f"*roofline {_title(method)}*", *told])
        for one in cases[0]["seconds"]:
            if one != BASE:
                rows.append(
                    [CANDIDATES[one].title, *(divided_text(case, one, BASE) for case in cases)]
                )
        return _section(title, about, table(["", *map(size_text, cases)], rows))

    return section


def _memory(cases: Sequence[Case]) -> str:
    case = cases[0]
    rows = [
        [CANDIDATES[name].title, bytes_text(kept), bytes_text(case["peak_bytes"][name])]
        for name, kept in case["kept_bytes"].items()
    ]
    about = (
        f"{count_text(case['layers'], 'layer')}, {case['width']} wide, an activation after "
        f"each, {count_text(case['tokens'], 'token')}, float32. *Kept* is what autograd saves "
        "for the backward pass; *peak* is the most that a step has allocated at one time, both "
        "without the parameters."
    )
    return _section("Memory", about, table(["", "kept", "peak"], rows))


def _start_up(cases: Sequence[Case]) -> str:
    injections = [case for case in cases if case["what"] != "files"]
    names = list(injections[0]["seconds"])
    adapting = [[case["what"], *(median_text(case, name) for name in names)] for case in injections]
    keys = ("save", "load", "swap", "tensors_save", "tensors_load")
    files = [
        [
            f"{bytes_text(case['adapter_bytes'])} for {bytes_text(case['base_bytes'])}",
            *(median_text(case, key) for key in keys),
        ]
        for case in cases
        if case["what"] == "files"
    ]
    return _section(
        "Start-up and files",
        "Time to adapt a model, and to save and load an adapter; beside them `save_file` and "
        "`load_file` of safetensors with the same tensors.",
        table(["", *(CANDIDATES[name].title for name in names)], adapting),
        table(["file, base", "save", "load", "replace", "save_file", "load_file"], files),
    )


def _routed(cases: Sequence[Case]) -> str:
    ways = {"routed": "one batch", "one_by_one": "one by one", "one_adapter": "one for all"}
    rows = [
        [
            f"{CANDIDATES[name].title}, {text}",
            *(divided_text(case, f"{name}_{way}", BASE) for case in cases),
        ]
        for name in ("bone", "bat", OTHER)
        for way, text in ways.items()
    ]
    header = [
        f"{count_text(case['adapters'], 'adapter')}, {count_text(case['tokens'], 'token')}"
        for case in cases
    ]
    one = cases[0]
    about = (
        f"{one['samples']} samples, each with an adapter of its own, through {one['layers']} "
        f"layers of {one['width']} x {one['width']}, forward in float32, divided by the frozen "
        "base. PEFT routes by `adapter_names`."
    )
    return _section("A batch with many adapters", about, table(["", *header], rows))


def _loaded(cases: Sequence[Case]) -> str:
    (case,) = cases
    load, part = case["load_seconds"], max(1, len(case["load_seconds"]) // 10)
    first, last = (seconds_text(statistics.median(some)) for some in (load[:part], load[-part:]))
    forward = Spread.of(paired_ratios(case["seconds"], "active_of_many", "active_of_one"))
    resident = case["resident_bytes"]
    grown = "" if resident is None else f" The process grows by {bytes_text(resident)}."
    return (
        f"## Many loaded adapters\n\n{count_text(case['adapters'], 'adapter')} with r = "
        f"{case['r']} in {case['layers']} layers of {case['width']} x {case['width']}: the blocks "
        f"have {bytes_text(case['block_bytes'])}.{grown} Loading one takes {first} at first and "
        f"{last} at last. A forward takes {spread_text(forward)} times that of a model with one.\n"
    )


def _experts(cases: Sequence[Case]) -> str:
    names = ("bone", "bat", OTHER)
    rows = [
        [
            f"{case['model']}, {case['experts']} experts of {case['hidden']} x {case['inner']}, "
            f"{count_text(case['tokens'], 'token')}, {case['implementation']}",
            median_text(case, BASE),
            *(divided_text(case, name, BASE) for name in names),
            *(bytes_text(case["kept_bytes"][name]) for name in (BASE, *names)),
        ]
        for case in cases
    ]
    titles = [CANDIDATES[name].title for name in names]
    header = ["", "frozen", *titles, "kept: frozen", *(f"kept: {title}" for title in titles)]
    about = (
        "A training step of one layer, with only the stacked weights of its experts adapted, in "
        "each implementation of `transformers`. PEFT adapts them by `target_parameters`. *Kept* is "
        "what autograd saves for the backward pass."
    )
    return _section("A mixture of experts", about, table(header, rows))


def _compiled(cases: Sequence[Case]) -> str:
    rows = []
    for case in cases:
        for name in case["seconds"]:
            if name.endswith(COMPILED):
                continue
            others = (name, BASE + COMPILED, OTHER + COMPILED)
            ratios = [divided_text(case, name + COMPILED, other) for other in others]
            rows.append([f"{size_text(case)}, {CANDIDATES[name].title}", *ratios])
    about = "The step compiled by `torch.compile`, divided by three others."
    header = ["", "/ eager", "/ frozen, compiled", "/ LoRA, compiled"]
    return _section("Compiled", about, table(header, rows))


def _groups(cases: Sequence[Case]) -> str:
    rows = []
    for name, candidate in WITH_GROUPS.items():
        times = []
        for case in cases:
            times += [
                divided_text(case, name, "bone"),
                divided_text(case, name + COMPILED, "bone" + COMPILED),
            ]
        rows.append([candidate.title, *times])
    header = [""]
    for case in cases:
        what = f"{case['work']}, {case['width']} wide"
        header += [what, f"{what}, compiled"]
    kept = [
        [WITH_GROUPS[name].title, *(bytes_text(case["kept_bytes"][name]) for case in cases[::2])]
        for name in WITH_GROUPS
    ]
    one = cases[0]
    about = (
        f"A forward without gradients, and a training step, of one linear layer with r = "
        f"{one['r']} and {count_text(one['tokens'], 'token')}, {one['dtype']}, divided by MiSS. "
        "*n groups* are one for each shard. MiSS of size 2 r has twice the parameters, and the "
        "rank of two groups. *Kept* is what autograd saves for the backward pass."
    )
    widths = [f"kept, {case['width']} wide" for case in cases[::2]]
    return _section("Groups of shards", about, table(header, rows), table(["", *widths], kept))


# --- side by side in one trainer -----------------------------------------------------------------

BESIDE = {
    "seconds": "seconds",
    "processor_seconds": "processor time",
    "peak_bytes": "peak",
    "pass_bytes": "pass",
}
"""The figures of a contestant, and what the tables call them."""


def _beside(case: Case, one: str, other: str, figure: str) -> Spread:
    """Return the ratio of two contestants; that of the sums where their batches differ."""
    first, second = (case["contestants"][name][figure] for name in (one, other))
    if not isinstance(first, list):
        return Spread.of([first / second])
    if CONTESTANTS[one].grouped != CONTESTANTS[other].grouped:
        return Spread.of([sum(first) / sum(second)])
    return Spread.of([a / b for a, b in zip(first, second, strict=True)])


def _all_beside(case: Case, one: str, other: str) -> list[str]:
    return [spread_text(_beside(case, one, other, figure)) for figure in BESIDE]


def _short(case: Case, one: str, other: str) -> list[str]:
    """Return the time and the peak of memory of one contestant, divided by another's."""
    return [short_text(_beside(case, one, other, name)) for name in ("seconds", "peak_bytes")]


def _adapter(cases: Sequence[Case]) -> str:
    found = []
    for case in cases:
        (lora, lora_peak), (miss, miss_peak) = (
            _short(case, "sft_bone", other) for other in ("sft_lora", "sft_miss")
        )
        found.append(
            f"In {case['dtype']}, a step with disha takes {lora} of the time of PEFT's LoRA and "
            f"{miss} of that of PEFT's MiSS; its peak of memory is {lora_peak} and {miss_peak} of "
            "theirs."
        )
    rows = [
        [f"{case['dtype']}, {CONTESTANTS[name].title}", *_all_beside(case, name, "sft_lora")]
        for case in cases
        for name in case["contestants"]
    ]
    about = (
        "`SFTTrainer` with SmolLM2-135M and each adapter, with as many parameters, the same rows "
        "and the same order, in the dtype that its library gives it by default. The processes take "
        "turns, step by step. *Peak* is the resident memory of a process since training began, "
        "*pass* what the allocator gives out in one forward and backward pass. Divided by PEFT's "
        "LoRA."
    )
    about = f"**{' '.join(found)}**\n\n{about}"
    return _section("One trainer, three adapters", about, table(["", *BESIDE.values()], rows))


def _job(cases: Sequence[Case]) -> str:
    (case,) = cases
    whole, whole_peak = _short(case, *PARTS["all"])
    beside_miss, miss_peak = _short(case, *PARTS["all, against PEFT's MiSS"])
    adapter, adapter_peak = _short(case, *PARTS["adapter"])
    rows = [[part, *_all_beside(case, one, other)] for part, (one, other) in PARTS.items()]
    about = (
        f"**The adapter takes {adapter} of the time of PEFT's LoRA in the same `Trainer`, and "
        f"{adapter_peak} of its peak of memory.** The rest of what `disha finetune` gains is no "
        "merit of the adapter: the loss on learned positions alone is `trl`'s, and batches of "
        "similar length, of 256 rows, are `transformers`'. They would help any adapter. With them, "
        f"the command takes {whole} of the time and {whole_peak} of the memory of `Trainer` with "
        f"PEFT's LoRA ({beside_miss} and {miss_peak} of PEFT's MiSS).\n\n"
        "The table goes from `Trainer` with PEFT's LoRA to what `disha finetune` does, one part "
        "after the other, each divided by what was before it."
    )
    return _section("The whole job, part by part", about, table(["", *BESIDE.values()], rows))


SECTIONS: Mapping[str, Callable[[Sequence[Case]], str]] = {
    "memory": _memory,
    "layer_step": _timed(
        "layer_step",
        "Training step of one linear layer",
        "Forward and backward, including the gradient of the input, divided by the frozen layer.",
    ),
    "model_step": _timed(
        "model_step",
        "Training step of a language model",
        "SmolLM2-135M, the seven projections of every layer adapted, loss on every token. The "
        "output of the embedding requires a gradient in all candidates.",
    ),
    "few_tokens": _timed(
        "few_tokens",
        "Forward pass of a few tokens",
        "Without gradients, as in decoding. Each candidate has its own copy of the weight. BAT "
        "computes another product, so it can be below the roofline.",
    ),
    "adapter": _adapter,
    "job": _job,
    "experts": _experts,
    "routed": _routed,
    "loaded": _loaded,
    "start_up": _start_up,
    "compiled": _compiled,
    "groups": _groups,
}


if __name__ == "__main__":
    sys.exit(main())
