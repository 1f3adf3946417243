"""`python -m benchmarks.report FILES`: write a page with tables and a picture from results.

Every number on the page comes from a file. A table is taken from the first file that has it, so
name the newest file first.
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
from benchmarks.markdown import (
    box,
    bytes_text,
    count_text,
    folded,
    ratio_text,
    seconds_text,
    short_text,
    spread_text,
    table,
)
from benchmarks.protocol import Spread, paired_ratios
from benchmarks.results import ResultsError, read_results
from benchmarks.roofline import floor
from benchmarks.side_by_side import CONTESTANTS, PARTS

__all__ = ["Row", "compared", "main", "over_base", "page"]

Case = Mapping[str, Any]
Results = Mapping[str, Any]
Tables = Mapping[str, Sequence[Case]]

PAGE, PICTURE = "performance.md", "assets/compared.png"
NOTHING = "-"
OTHER = "peft_lora"
SHOWN = ("bone", "bat", "peft_miss")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and its picture."""
    from benchmarks.plots import compared_picture

    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument(
        "results", type=Path, nargs="+", help="files of `python -m benchmarks`, the newest first"
    )
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder to write into")
    asked = parser.parse_args(arguments)
    try:
        files = [read_results(path) for path in asked.results]
    except ResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    picture = asked.docs / PICTURE
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(compared_picture(compared(_tables(files))))
    (asked.docs / PAGE).write_text(page(files), encoding="utf-8")
    print(asked.docs / PAGE)
    return 0


def _tables(files: Iterable[Results]) -> dict[str, Sequence[Case]]:
    """Return each table of the first file that has it."""
    found: dict[str, Sequence[Case]] = {}
    for results in files:
        found = {**results["tables"], **found}
    return found


def page(files: Sequence[Results]) -> str:
    """Return the page in Markdown."""
    tables = _tables(files)
    there = [name for name in SECTIONS if name in tables]
    used = [one for one in files if any(_from(name, files) is one for name in there)]
    quick = any(results["profile"] != "full" for results in used)
    sections = []
    for name in there:
        run = used.index(_from(name, files)) + 1
        told = f"*Run {run}.* " if len(used) > 1 else ""
        sections.append(SECTIONS[name](tables[name]).replace("\n\n", f"\n\n{told}", 1))
    listed = "".join(f"{number}. {_run(results)}\n" for number, results in enumerate(used, 1))
    return "\n".join(
        [
            f"# Speed and memory\n{QUICK if quick else ''}",
            box("Time and memory, divided by those of PEFT's LoRA", _summary(compared(tables))),
            f"![Time and memory, compared with PEFT's LoRA]({PICTURE})\n",
            HOW_TO_READ,
            *sections,
            f"## The runs\n\n{ABOUT_RUNS}\n\n{listed}",
        ]
    )


def _from(name: str, files: Sequence[Results]) -> Results:
    return next(results for results in files if name in results["tables"])


QUICK = "\n**This is a quick run of small sizes: its times are noise.**\n"
HOW_TO_READ = """\
How it is measured: all candidates run in one process, in rounds, each round in a new random order.
A ratio is taken within a round. The tables have the median over the rounds, and half the distance
of the quartiles after the sign ±. *Frozen* is the same layer or model without an adapter; gradients
pass through it. All candidates have as many trained parameters as MiSS (Bone) with r = 64, and
adapters of the base's dtype. Each must change the output and get gradients before it is timed. The
*roofline* is the lowest ratio that the machine allows: it adds up the time of each product and of
each pass over memory, at speeds that are measured beside the steps
([how](../benchmarks/roofline.py)).
"""
ABOUT_RUNS = """\
`python -m benchmarks.report` writes this page from the results of `make bench`, which are in
`benchmarks/results/`. Nothing was measured on a GPU, and no model has more than 135M parameters."""


def _run(results: Results) -> str:
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        f"{results['date'][:10]}, {results['device']}, {machine['processor']} "
        f"({machine['instructions']}), {count_text(machine['cores'], 'core')}, "
        f"{bytes_text(machine['memory_bytes'])} of memory; {versions}."
    )


# --- the box: figures / those of PEFT's LoRA -----------------------------------------------------


class Row(NamedTuple):
    """A figure that is compared with that of PEFT's LoRA: a line, a label, candidate -> ratio."""

    line: str
    label: str
    ratios: Mapping[str, Spread]


def compared(tables: Tables) -> list[Row]:
    """Return the figures that the tables have, in the order of the page."""
    found = []
    for line, label, name, where, figure, suffix in COMPARED:
        case = next(
            (one for one in tables.get(name, ()) if all(one.get(k) == v for k, v in where.items())),
            None,
        )
        if case is not None and OTHER + suffix in case[figure]:
            found.append(Row(line, label.format(**case), _over_lora(case[figure], suffix)))
    return found


def _over_lora(values: Mapping[str, Any], suffix: str) -> dict[str, Spread]:
    listed = {name: one if isinstance(one, list) else [one] for name, one in values.items()}
    return {
        name: Spread.of(paired_ratios(listed, name + suffix, OTHER + suffix))
        for name in SHOWN
        if name + suffix in listed
    }


TRAINING, SERVING = "One training step", "Serving unmerged"
GROUPED = {"implementation": "grouped_mm"}
COMPARED: Sequence[tuple[str, str, str, Mapping[str, Any], str, str]] = (
    ("Memory", "kept for backward by {layers} layers", "memory", {"what": "counted"}, "kept_bytes",
     ""),
    (TRAINING, "SmolLM2-135M, float32", "model_step", {"dtype": "float32"}, "seconds", ""),
    (TRAINING, "SmolLM2-135M, bfloat16", "model_step", {"dtype": "bfloat16"}, "seconds", ""),
    ("Experts", "{model}, step", "experts", GROUPED, "seconds", ""),
    ("Experts", "{model}, kept for backward", "experts", GROUPED, "kept_bytes", ""),
    (SERVING, "one token", "few_tokens", {"tokens": 1}, "seconds", ""),
    (SERVING, "a batch with {adapters} adapters", "routed", {"adapters": 64}, "seconds", "_routed"),
    ("Start", "adapt a 7B Llama", "start_up", {"what": "plan and inject a 7B Llama, meta"},
     "seconds", ""),
)  # fmt: skip
"""Line, label, table, values of the case, its figure, and what the candidates' names end in."""


def _summary(rows: Sequence[Row]) -> str:
    lines = []
    for line in dict.fromkeys(row.line for row in rows):
        told = " ".join(
            f"{row.label[0].upper()}{row.label[1:]}: "
            + ", ".join(f"{_title(name)} {short_text(one)}" for name, one in row.ratios.items())
            + "."
            for row in rows
            if row.line == line
        )
        lines.append(f"- **{line}.** {told}")
    return "\n".join([*lines, ABOUT_LINES])


def _title(name: str) -> str:
    return CANDIDATES[name].title.removeprefix("disha ")


ABOUT_LINES = """
Less than 1 is better than LoRA. MiSS (Bone) and BAT without a name before them are those of
`disha`. Brackets have the quartiles of the rounds."""


# --- one section for each table ------------------------------------------------------------------


def over_base(case: Case, name: str) -> Spread:
    """Return time of a candidate / time of the frozen base."""
    return Spread.of(paired_ratios(case["seconds"], name, BASE))


def _size(case: Case) -> str:
    where = case["model"] if "model" in case else f"{case['width']} wide"
    return f"{where}, {count_text(case['tokens'], 'token')}, {case['dtype']}"


def _timed(name: str, title: str, about: str) -> Callable[[Sequence[Case]], str]:
    """Return a section with candidates by cases, the roofline, and the time of the base."""

    def section(cases: Sequence[Case]) -> str:
        frozen = [seconds_text(Spread.of(case["seconds"][BASE]).median) for case in cases]
        rows = [["frozen", *frozen]]
        for method in ("bone", "bat"):
            floors = [floor(name, case, method) for case in cases]
            told = [NOTHING if one is None else f"*{ratio_text(one)}*" for one in floors]
            rows.append([f"*roofline {_title(method)}*", *told])
        for candidate in dict.fromkeys(one for case in cases for one in case["seconds"]):
            if candidate != BASE:
                rows.append([CANDIDATES[candidate].title, *_over_base(candidate, cases)])
        return _section(title, about, table(["", *map(_size, cases)], rows))

    return section


def _section(title: str, about: str, *tables: str) -> str:
    return f"## {title}\n\n{about}\n\n{folded('Tables', chr(10).join(tables))}"


def _over_base(name: str, cases: Sequence[Case]) -> list[str]:
    return [
        spread_text(over_base(case, name)) if name in case["seconds"] else NOTHING for case in cases
    ]


def _median(case: Case, name: str) -> str:
    seconds = case["seconds"].get(name)
    return NOTHING if seconds is None else seconds_text(statistics.median(seconds))


def _memory(cases: Sequence[Case]) -> str:
    counted = next(case for case in cases if case["what"] == "counted")
    rows = [
        [
            CANDIDATES[name].title,
            bytes_text(kept),
            bytes_text(counted["peak_bytes"][name]),
        ]
        for name, kept in counted["kept_bytes"].items()
    ]
    about = (
        f"{count_text(counted['layers'], 'layer')}, {counted['width']} wide, an activation after "
        f"each, {count_text(counted['tokens'], 'token')}, float32. *Kept* is what autograd saves "
        "for the backward pass; *peak* is the most that a step has allocated at one time, both "
        "without the parameters."
    )
    return _section("Memory", about, table(["", "kept", "peak"], rows))


def _start_up(cases: Sequence[Case]) -> str:
    injections = [case for case in cases if case["what"] != "files"]
    names = list(dict.fromkeys(name for case in injections for name in case["seconds"]))
    adapting = [
        [case["what"], *(_median(case, name) for name in names)]
        for case in injections
    ]  # fmt: skip
    keys = ("save", "load", "swap", "tensors_save", "tensors_load")
    files = [
        [
            f"{bytes_text(case['adapter_bytes'])} for {bytes_text(case['base_bytes'])}",
            *(_median(case, key) for key in keys),
        ]
        for case in cases
        if case["what"] == "files"
    ]
    header = ["file, base", "save", "load", "replace", "save_file", "load_file"]
    return _section(
        "Start-up and files",
        "Time to adapt a model, and to save and load an adapter; beside them `save_file` and "
        "`load_file` of safetensors with the same tensors.",
        table(["", *(CANDIDATES[name].title for name in names)], adapting),
        table(header, files),
    )


def _routed(cases: Sequence[Case]) -> str:
    ways = {"routed": "one batch", "one_by_one": "one by one", "one_adapter": "one for all"}
    rows = [
        [f"{CANDIDATES[name].title}, {text}", *_over_base(f"{name}_{way}", cases)]
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
            _median(case, BASE),
            *(_over_base(name, [case])[0] for name in names),
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
    for case in (case for case in cases if case["what"] == "timed"):
        seconds = case["seconds"]
        for name in (name for name in seconds if not name.endswith(COMPILED)):
            others = (name, BASE + COMPILED, OTHER + COMPILED)
            ratios = [
                spread_text(Spread.of(paired_ratios(seconds, name + COMPILED, other)))
                if other in seconds and other != name + COMPILED
                else NOTHING
                for other in others
            ]
            rows.append([f"{_size(case)}, {CANDIDATES[name].title}", *ratios])
    about = "The step compiled by `torch.compile`, divided by three others."
    header = ["", "/ eager", "/ frozen, compiled", "/ LoRA, compiled"]
    return _section("Compiled", about, table(header, rows))


def _adapter(cases: Sequence[Case]) -> str:
    rows = [
        [f"{case['dtype']}, {took['title']}", *_beside(case, name, "sft_lora")]
        for case in cases
        for name, took in case["contestants"].items()
    ]
    about = (
        "`SFTTrainer` with SmolLM2-135M and each adapter, with as many parameters, the same rows "
        "and the same order. The processes take turns, step by step. *Peak* is the resident "
        "memory of a process since training began, *pass* what the allocator gives out in one "
        "forward and backward pass. Divided by PEFT's LoRA."
    )
    return _section("One trainer, three adapters", about, table(BESIDE, rows))


def _job(cases: Sequence[Case]) -> str:
    (case,) = cases
    rows = [[part, *_beside(case, one, other)] for part, (one, other) in PARTS.items()]
    about = (
        "From `Trainer` with PEFT's LoRA to what `disha finetune` does, one part after the other, "
        "each divided by what was before it. Only the first is a merit of the adapter: `trl` "
        "computes the loss in parts, and `transformers` groups rows by length, for every adapter."
    )
    return _section("The whole job, part by part", about, table(BESIDE, rows))


BESIDE = ["", "seconds", "processor time", "peak", "pass"]


def _beside(case: Case, one: str, other: str) -> list[str]:
    """Return the ratios of two contestants; of the sums where their batches differ."""
    first, second = (case["contestants"][name] for name in (one, other))
    grouped = CONTESTANTS[one].grouped != CONTESTANTS[other].grouped
    told = []
    for field in ("seconds", "processor_seconds"):
        if grouped:
            told.append(ratio_text(sum(first[field]) / sum(second[field])))
        else:
            times = {one: first[field], other: second[field]}
            told.append(spread_text(Spread.of(paired_ratios(times, one, other))))
    return [*told, *(ratio_text(first[f] / second[f]) for f in ("peak_bytes", "pass_bytes"))]


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
}


if __name__ == "__main__":
    sys.exit(main())
