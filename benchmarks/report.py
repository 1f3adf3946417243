"""`python -m benchmarks.report FILES`: write a page with tables and plots from files of results.

Every number on the page comes from a file or from the cost model; the limits are in `targets`. A
table is taken from the first file that has it, so name the newest file first. The page lists the
other files with their score.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import cost_model, roofline
from benchmarks.candidates import BASE, CANDIDATES, METHOD_TITLES
from benchmarks.compared import lines, rows
from benchmarks.compiled import COMPILED
from benchmarks.devices import FACTS, NOT_ASKED
from benchmarks.markdown import (
    box,
    bytes_text,
    count_text,
    folded,
    ratio_text,
    seconds_text,
    spread_text,
    table,
)
from benchmarks.plots import plots
from benchmarks.protocol import Spread, paired_ratios
from benchmarks.results import ResultsError, read_results
from benchmarks.side_by_side import CONTESTANTS
from benchmarks.targets import (
    Outcome,
    candidate_floor,
    judge,
    over_base,
    roofline_floor,
    size_title,
)

__all__ = ["LOOP_LIMIT", "main", "page"]

Case = Mapping[str, Any]
Results = Mapping[str, Any]

PAGE, ASSETS = "performance.md", "assets"
NOTHING = "-"
LOOP_LIMIT = 1 / 0.95
"""The command must reach 95% of the bare step's throughput."""
DEMO_HELD_OUT = 256
"""Rows that the demo holds out, as older runs did."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and its plots.

    Args:
        arguments: of the command line; the process's by default.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument(
        "results", type=Path, nargs="+", help="files of `python -m benchmarks`, the newest first"
    )
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder to write into")
    asked = parser.parse_args(arguments)
    try:
        files = {path: read_results(path) for path in asked.results}
    except ResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tables = {name: _of(name, files)["tables"][name] for name in _names(files)}
    (asked.docs / ASSETS).mkdir(parents=True, exist_ok=True)
    drawn = plots(tables)
    for name, png in drawn.items():
        (asked.docs / ASSETS / name).write_bytes(png)
    (asked.docs / PAGE).write_text(page(files, list(drawn)), encoding="utf-8")
    outcomes = judge(tables)
    print(f"{asked.docs / PAGE}: {_score(outcomes)}")
    for outcome in outcomes:
        if outcome.met is False:
            print(f"missed: {outcome.target.title}: {spread_text(outcome.figure)}")
    return 0


def _names(files: Mapping[Path, Results]) -> list[str]:
    return list(dict.fromkeys(name for results in files.values() for name in results["tables"]))


def _of(name: str, files: Mapping[Path, Results]) -> Results:
    """Return the first results that have a table."""
    return next(results for results in files.values() if name in results["tables"])


def page(files: Mapping[Path, Results], drawn: Sequence[str] = ()) -> str:
    """Return the page in Markdown.

    Args:
        files: path -> results, the newest first.
        drawn: names of the plots beside the page.
    """
    sections: Mapping[str, Callable[[Results], str]] = {
        "layer_step": _layer_step,
        "few_tokens": _few_tokens,
        "model_step": _model_step,
        "memory": _memory,
        "start_up": _start_up,
        "routed": _routed,
        "loaded": _loaded,
        "switching": _switching,
        "experts": _experts,
        "finetuning": _finetuning,
        "side_by_side": _side_by_side,
        "compiled": _compiled,
        "devices": _devices,
    }
    there = [name for name in sections if name in _names(files)]
    used = list(dict.fromkeys(id(_of(name, files)) for name in there))
    numbers = {one: number for number, one in enumerate(used, 1)}
    tables = {name: _of(name, files)["tables"][name] for name in there}
    others = {path: one for path, one in files.items() if id(one) not in numbers}
    runs = [next(one for one in files.values() if id(one) == key) for key in used]
    parts = [_head(runs), _summary(tables, drawn)]
    for name in there:
        results = _of(name, files)
        run = f"*Run {numbers[id(results)]}.* " if len(numbers) > 1 else ""
        text = sections[name](results).replace("\n\n", f"\n\n{run}", 1)
        if f"{name}.png" in drawn:
            about, listed = text.split("\n|", 1)
            text = f"{about}\n![{name}]({ASSETS}/{name}.png)\n\n{folded('Tables', '|' + listed)}"
        parts += [text, _left_out(tables[name])]
    parts += [_on_paper(), _runs(runs), _elsewhere(others), _targets(judge(tables))]
    return "\n".join(filter(None, parts))


def _head(measured: Sequence[Results]) -> str:
    quick = any(results["profile"] != "full" for results in measured)
    warning = " **This is a quick run of small sizes: its times are noise.**" if quick else ""
    return f"# Speed and memory\n\n{ABOUT_PAGE}{warning}\n"


ABOUT_PAGE = """\
This page compares the speed and the memory of `disha` with those of other adapter libraries. The
box has the answer in short. The sections below it show how each figure was measured."""


def _summary(tables: Mapping[str, Sequence[Case]], drawn: Sequence[str]) -> str:
    """Return the lines and the picture that answer most questions, and how to read the rest."""
    found = rows(tables)
    listed = "\n".join(f"- {line}" for line in lines(found))
    text = f"{listed}\n\n{ABOUT_LINES}"
    title = "In short: time and memory, divided by those of PEFT's LoRA"
    parts = [box(title, text)] if found else []
    if "compared.png" in drawn:
        parts.append(f"![Time and memory, compared with PEFT's LoRA]({ASSETS}/compared.png)\n")
    return "\n".join([*parts, folded("How to read the tables", HOW_TO_READ)])


ABOUT_LINES = """\
Each figure is divided by that of PEFT's LoRA with as many trained parameters. So 0.5 means half the
time, or half the memory. Brackets have the quartiles of the rounds. Bone and BAT are
[methods](choosing.md#method) of `disha`; MiSS is PEFT's name for Bone. The whole job is
`disha finetune` against the Trainer of `transformers` with PEFT, on the same rows of text.
"""
HOW_TO_READ = """\
- If the page has several runs, each section names its run. [A list](#the-runs) is at the end.
- Times are divided by those of the *frozen base*: the same layer or model without an adapter.
  Nothing in it is trained, but gradients pass through it.
- *Multiply-adds* is the same ratio, counted in multiply-adds of the products alone.
- The *roofline* is the lowest ratio that the machine of the run allows. It adds up the time of each
  product and of each pass over memory, at speeds that were measured beside the steps
  ([how](../benchmarks/roofline.py)). In a run without these speeds, only the tables of few tokens
  have a roofline.
- All candidates have as many trained parameters as Bone with r = 64. For square layers that is
  LoRA of rank 32. Adapters have the dtype of the base.
- All candidates run in one process, in rounds. Each round has a new random order. A ratio is taken
  within one round. The tables show the median over the rounds, and the quartiles in brackets.
- Before the timing, each candidate must change the output and get gradients. Candidates of the same
  method must return the same output.
"""


def _runs(measured: Sequence[Results]) -> str:
    listed = "".join(f"{number}. {_run(results)}\n" for number, results in enumerate(measured, 1))
    return f"""## The runs

`python -m benchmarks.report` writes this page from the results of `python -m benchmarks`; no number
is typed by hand.

{listed}"""


def _run(results: Results) -> str:
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    slower = "".join(
        f" Without {dtype.removeprefix('torch.')}, for which this processor has no instructions: "
        f"a product took {ratio_text(ratio)} times as long as in float32."
        for dtype, ratio in results.get("slow_dtypes", {}).items()
    )
    return f"{_machine(results)}, {count_text(machine['threads'], 'thread')}. {versions}.{slower}"


def _machine(results: Results) -> str:
    machine = results["machine"]
    device = "" if results["device"] == "cpu" else f"{results['device']}, "
    return (
        f"{results['date'][:10]}, {device}{machine['processor']} ({machine['instructions']}), "
        f"{count_text(machine['cores'], 'core')}, {bytes_text(machine['memory_bytes'])} of memory"
    )


# --- one section for each table ------------------------------------------------------------------


def _ratios(name: str, cases: Sequence[Case], title: Callable[[Case], str] = size_title) -> str:
    """Return a table of candidates by cases, with both floors and the time of the base."""
    header = ["", *(title(case) for case in cases)]
    rows = [
        ["frozen base", *(seconds_text(Spread.of(case["seconds"][BASE]).median) for case in cases)]
    ]
    for floor_title, floor_of in (
        ("multiply-adds", candidate_floor),
        ("roofline", roofline_floor),
    ):
        for method, method_title in METHOD_TITLES.items():
            floors = [floor_of(name, case, method) for case in cases]
            if any(floor is not None for floor in floors):
                texts = [NOTHING if one is None else f"*{ratio_text(one)}*" for one in floors]
                rows.append([f"*{floor_title} {method_title}*", *texts])
    for candidate in dict.fromkeys(one for case in cases for one in case["seconds"]):
        if candidate != BASE:
            rows.append([CANDIDATES[candidate].title, *_over_base(candidate, cases)])
    return table(header, rows)


def _over_base(name: str, cases: Sequence[Case]) -> list[str]:
    return [
        spread_text(over_base(case, name)) if name in case["seconds"] else NOTHING for case in cases
    ]


def _tokens_per_second(results: Results, cases: Sequence[Case]) -> str:
    if results["device"] == "cpu":
        return ""
    rows = [
        [
            CANDIDATES[candidate].title,
            *(
                f"{case['tokens'] / Spread.of(case['seconds'][candidate]).median:,.0f}"
                if candidate in case["seconds"]
                else NOTHING
                for case in cases
            ),
        ]
        for candidate in dict.fromkeys(one for case in cases for one in case["seconds"])
    ]
    return "\n" + table(["tokens per second", *map(size_title, cases)], rows)


def _timed(name: str, title: str, about: str, results: Results) -> str:
    cases = results["tables"][name]
    parts = [cases[first : first + COLUMNS] for first in range(0, len(cases), COLUMNS)]
    times = "\n".join(_ratios(name, part) + _tokens_per_second(results, part) for part in parts)
    return f"## {title}\n\n{about}\n\n{times}"


COLUMNS = 4
"""Most cases in one table of times: more would not fit on a screen."""


def _layer_step(results: Results) -> str:
    about = "Forward and backward, including the gradient of the input."
    cases = [case for case in results["tables"]["layer_step"] if "rates" in case]
    if cases:
        about += f"\n\n{_least(cases)}"
    times = _timed("layer_step", "Training step of one linear layer", about, results)
    return times + (_pieces(cases) + _rates(cases) if cases else "")


def _least(cases: Sequence[Case]) -> str:
    """Return what no implementation can beat, in words."""

    def floors(method: str, of: Sequence[Case]) -> str:
        found = (roofline_floor("layer_step", case, method) for case in of)
        return _range([floor for floor in found if floor is not None])

    products = [case["rates"]["layers"][0]["products"] for case in cases]
    narrow = [one[name] / one["x W^T"] for one in products for name in NARROW]
    copies = [case["rates"][where] for case in cases for where in ("cached", "memory")]
    floors_in_products = (candidate_floor("layer_step", case, "bone") for case in cases)
    counted = [floor for floor in floors_in_products if floor is not None]
    said = (
        "No implementation that keeps the update apart from the weight can beat the *roofline*: "
        f"{floors('bone', cases)} for Bone, {floors('bat', cases)} for BAT. By multiply-adds "
        f"alone, Bone could reach {_range(counted)}. But its narrow products run at "
        f"{_range(narrow, _percent)} of the speed of the base's product. Bone also adds to the "
        "output and to the gradient of the input, so both are read and written again, at "
        f"{_range(copies, _billions)} GB/s."
    )
    single = [case for case in cases if case["dtype"] == "float32"]
    if single:
        said += (
            " In float32, an implementation that adds dW to the weight in each pass, as BAT does, "
            f"could reach {floors(roofline.FORMED, single)}. In 16 bits, it would lose small "
            "updates to rounding."
        )
    return said


NARROW = ("S D", "dY D^T", "S^T dY")


def _range(values: Sequence[float], text: Callable[[float], str] = ratio_text) -> str:
    low, high = text(min(values)), text(max(values))
    return low if low == high else f"{low} to {high}"


def _percent(part: float) -> str:
    return f"{100 * part:.0f}%"


def _pieces(cases: Sequence[Case]) -> str:
    """Return where the time of Bone's step goes: each piece alone, and its floor."""
    columns = []
    for case in cases:
        width, tokens, r = case["width"], case["tokens"], case["r"]
        ((layer, rates),) = roofline.read_rates(case["rates"]).items()
        itemsize = getattr(torch, case["dtype"]).itemsize
        terms = [
            *roofline.input_terms(width, tokens, "bone", r, itemsize),
            *roofline.layer_terms(layer, tokens, "bone", r, itemsize),
        ]
        least = {term.name: roofline.seconds([term], rates) for term in terms}
        alone = {name: statistics.median(taken) for name, taken in case["pieces"].items()}
        step = [
            bone - frozen
            for bone, frozen in zip(case["seconds"]["bone"], case["seconds"][BASE], strict=True)
        ]
        whole = statistics.median(step)
        columns.append(
            [
                *(f"{_ms(alone[name])} (*{_ms(least[name])}*)" for name in alone),
                f"{_ms(whole - sum(alone.values()))} (*0*)",
                f"{_ms(whole)} (*{_ms(sum(least.values()))}*)",
            ]
        )
    names = [*cases[0]["pieces"], "the rest", "Bone step - frozen step"]
    rows = [[name, *(column[i] for column in columns)] for i, name in enumerate(names)]
    return (
        "\nWhat Bone adds to the step, in milliseconds: each piece timed alone, and in brackets "
        "its *floor*, the least time that the measured speeds allow. *The rest* is calls, "
        "allocation, and data that is no longer in a cache.\n\n"
        + table(["", *map(size_title, cases)], rows)
    )


def _billions(count: float) -> str:
    return f"{count / 1e9:.0f}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _rates(cases: Sequence[Case]) -> str:
    names = list(cases[0]["rates"]["layers"][0]["products"])
    rows = [
        [name, *(_billions(case["rates"]["layers"][0]["products"][name]) for case in cases)]
        for name in names
    ]
    rows += [
        [f"copying {where}", *(_billions(case["rates"][key]) for case in cases)]
        for key, where in (("cached", "within a cache"), ("memory", "more than the caches hold"))
    ]
    return (
        "\nThe measured speeds: for products, 10^9 multiply-adds per second; for copying, GB that "
        "are read and written per second.\n\n" + table(["", *map(size_title, cases)], rows)
    )


def _few_tokens(results: Results) -> str:
    about = (
        "Without gradients, as in decoding. Each candidate has its own copy of the weights. So no "
        "candidate finds them in the cache because another one has just read them. Here the "
        "roofline counts bytes: the weight and the adapter are read once each. It takes the time "
        "of the base's own product as it is. BAT computes another product, so it can be below the "
        "roofline."
    )
    cases = results["tables"]["few_tokens"]
    if any(over_base(case, "bone").median < 1 for case in cases if "bone" in case["seconds"]):
        about += f"\n\n{LESS_THAN_FROZEN}"
    return _timed("few_tokens", "Forward pass of a few tokens", about, results)


LESS_THAN_FROZEN = (
    "Where Bone takes less time than the frozen base, the run is of a version of disha that "
    "computed the base's own product in blocks of rows. Today it is torch's own product."
)


def _model_step(results: Results) -> str:
    about = (
        "SmolLM2-135M, with all seven projections of every layer adapted; sequences of equal "
        "length, loss on every token. The output of the embedding requires a gradient in all "
        "candidates. Multiply-adds are those of the projections, the head and causal attention."
    )
    return _timed("model_step", "Training step of a language model", about, results)


def _memory(results: Results) -> str:
    parts = ["## Memory\n"]
    for case in results["tables"]["memory"]:
        sizes = (
            f"{case['layers']} layers, {case['width']} wide, an activation after each, "
            f"{case['tokens']:,} tokens, {case['dtype']}"
        )
        if case["what"] == "counted":
            parts.append(
                f"{sizes}. *Kept* is what autograd saves for the backward pass. *Peak* is the most "
                "memory that a step has allocated at one time. Both are counted in bytes, without "
                "the parameters.\n"
            )
            rows = [
                [
                    CANDIDATES[name].title,
                    bytes_text(kept),
                    bytes_text(case["peak_bytes"][name]),
                    bytes_text(case["peak_bytes"][name] - case["peak_bytes"][BASE]),
                ]
                for name, kept in case["kept_bytes"].items()
            ]
            parts.append(table(("", "kept", "peak", "peak beyond frozen"), rows))
        elif case["resident_bytes"]:
            parts.append(
                f"How much the resident memory of a new process grows up to its peak: {sizes}.\n"
            )
            rows = [
                [CANDIDATES[name].title, bytes_text(growth)]
                for name, growth in case["resident_bytes"].items()
            ]
            parts.append(table(("", "resident"), rows))
    return "\n".join(parts)


def _start_up(results: Results) -> str:
    cases = results["tables"]["start_up"]
    injections = [case for case in cases if case["what"] != "files"]
    names = list(dict.fromkeys(name for case in injections for name in case["seconds"]))

    def median(case: Case, name: str) -> str:
        seconds = case["seconds"].get(name)
        return NOTHING if seconds is None else seconds_text(Spread.of(seconds).median)

    rows = [[case["what"], *(median(case, name) for name in names)] for case in injections]
    about = "## Start-up\n\nTime to adapt a model, and to save and load an adapter.\n"
    parts = [about, table(["", *(CANDIDATES[name].title for name in names)], rows)]
    keys = ("save", "load", "swap", "tensors_save", "tensors_load")
    header = ["adapter file, base", "save", "load into a plain model", "replace in place",
              "safetensors alone: save", "safetensors alone: load"]  # fmt: skip
    rows = [
        [
            f"{bytes_text(case['adapter_bytes'])}, {bytes_text(case['base_bytes'])}",
            *(median(case, key) for key in keys),
        ]
        for case in cases
        if case["what"] == "files"
    ]
    return "\n".join([*parts, table(header, rows)])


def _routed(results: Results) -> str:
    cases = results["tables"]["routed"]
    header = [
        f"{count_text(case['adapters'], 'adapter')}, {count_text(case['tokens'], 'token')}"
        for case in cases
    ]
    ways = {
        "routed": "one batch",
        "one_by_one": "adapter by adapter",
        "one_adapter": "one adapter for all",
    }
    rows = [
        [f"{CANDIDATES[name].title}, {text}", *_over_base(f"{name}_{way}", cases)]
        for name in ("bone", "bat", "peft_lora")
        for way, text in ways.items()
        if any(f"{name}_{way}" in case["seconds"] for case in cases)
    ]
    one = cases[0]
    return (
        "## Routed batches\n\n"
        f"A batch of {one['samples']} samples, each with an adapter of its own; {one['layers']} "
        f"layers of {one['width']} x {one['width']}, {one['dtype']}, forward without gradients. "
        "Times are ratios to the same batch through the frozen base. PEFT routes by "
        "`adapter_names`.\n\n" + table(["", *header], rows)
    )


def _loaded(results: Results) -> str:
    rows = []
    for case in results["tables"]["loaded"]:
        load, resident = case["load_seconds"], case["resident_bytes"]
        part = max(1, len(load) // 10)
        rows.append([
            count_text(case["adapters"], "adapter"),
            bytes_text(case["block_bytes"]),
            "not told" if resident is None else bytes_text(resident),
            *(seconds_text(Spread.of(some).median) for some in (load[:part], load[-part:])),
            *(
                spread_text(Spread.of(paired_ratios(case["seconds"], many, one)))
                for many, one in (("active_of_many", "active_of_one"),
                                  ("routed_of_many", "routed_of_one"))
            ),
        ])  # fmt: skip
    one = results["tables"]["loaded"][0]
    about = (
        "## Many loaded adapters\n\n"
        f"A model of {one['layers']} layers of {one['width']} x {one['width']}, {one['dtype']}, "
        f"into which adapters with r = {one['r']} are loaded from a file, in a new process. *At "
        "first* and *at last* are medians over the first and over the last tenth of the adapters. "
        "The time of a forward is divided by that of a model with one adapter.\n"
    )
    header = ["loaded", "blocks", "resident growth", "load one, at first", "load one, at last",
              "forward / of one", "routed forward / of one"]  # fmt: skip
    return "\n".join([about, table(header, rows)])


def _switching(results: Results) -> str:
    rows = []
    for case in results["tables"]["switching"]:
        for turn, seconds in case["turns"].items():
            spread, quarter = Spread.of(seconds), len(seconds) // 4
            growth = Spread.of(seconds[-quarter:]).median / Spread.of(seconds[:quarter]).median
            rows.append([turn, str(len(seconds)), seconds_text(spread.median), f"{growth:.2f}"])
    one = results["tables"]["switching"][0]
    about = (
        "## Swapping adapters\n\n"
        f"`load_adapter(model, file, replace=True)` in a model of {one['layers']} layers of "
        f"{one['width']} x {one['width']}, for files with r of "
        f"{', '.join(map(str, one['ranks']))} in turn. Every second file adapts half of the "
        f"layers. The adapter in the model has r = {one['r']} and stays as it is, so compiled code "
        "is not compiled again.\n"
    )
    header = ["turn", "files", "one switch, median", "last quarter / first quarter"]
    return "\n".join([about, table(header, rows)])


def _experts(results: Results) -> str:
    cases = results["tables"]["experts"]
    clock = " Times are CPU times." if cases[0].get("clock") == "cpu" else ""

    def title(case: Case) -> str:
        return (
            f"{case['model']}, {case['experts']} experts of {case['hidden']} x {case['inner']}, "
            f"{case['tokens']:,} tokens, {case['implementation']}"
        )

    kept = [
        [title(case), *(bytes_text(case["kept_bytes"][name]) for name in case["kept_bytes"])]
        for case in cases
    ]
    rows = [
        [
            title(case),
            seconds_text(Spread.of(case["seconds"][BASE]).median),
            *(
                spread_text(over_base(case, name)) if name in case["seconds"] else NOTHING
                for name in ("bone", "bat", "peft_lora")
            ),
        ]
        for case in cases
    ]
    titles = [CANDIDATES[name].title for name in ("bone", "bat", "peft_lora")]
    header = ["", *(CANDIDATES[name].title for name in cases[0]["kept_bytes"])]
    return (
        "## Training step of a mixture of experts\n\n"
        "One layer, with only the stacked weights of its experts adapted, in each implementation "
        f"of `transformers`. PEFT adapts them by `target_parameters`.{clock}\n\n"
        + table(["", "frozen base", *titles], rows)
        + "\nKept for the backward pass:\n\n"
        + table(header, kept)
    )


def _finetuning(results: Results) -> str:
    cases = results["tables"]["finetuning"]
    (loop,) = (case for case in cases if case["what"] == "loop")
    ratio = Spread.of(paired_ratios(loop["seconds"], "loop", "bare"))
    met = "met" if ratio.median <= LOOP_LIMIT else "**missed**"
    held_out = next((case["held_out"] for case in cases if "held_out" in case), DEMO_HELD_OUT)
    rows = [
        (
            case["title"],
            str(case["steps"]),
            f"{case['before']:.3f}",
            f"{case['after']:.3f}",
            f"{case['trainable']:,}",
            bytes_text(case["peak_memory_bytes"]),
        )
        for case in cases
        if case["what"] == "run"
    ]
    header = ("method", "steps", "loss before", "loss after", "trained parameters", "peak memory")
    return f"""## The fine-tuning command

`disha finetune` with SmolLM2-135M-Instruct, r = 64, on the demo's docstrings of the standard
library. The loss is that of {held_out} held-out functions, in nats per token. The runs are short.
They show that every way of training lowers the loss, but not which way lowers it most.

{table(header, rows)}
What does the command's loop cost? A step of it has accumulation, clipping, a schedule, AdamW,
checks, and metrics on disk. It takes **{spread_text(ratio)}** times as long as a bare step
(forward, backward, AdamW), with {loop["layers"]} layers and {loop["batch"]} sequences of
{loop["length"]} tokens. The limit of {ratio_text(LOOP_LIMIT)} is {met}.
"""


def _side_by_side(results: Results) -> str:
    contests, (padding,), (loss,) = (
        [case for case in results["tables"]["side_by_side"] if case["what"] == what]
        for what in ("contest", "padding", "vocabulary")
    )
    first, rows = contests[0], []
    for case in contests:
        for name, took in case["contestants"].items():
            ratios = [
                spread_text(_over_lora(case, name, field))
                for field in ("seconds_per_step", "peak_bytes")
            ]
            peak = bytes_text(statistics.median(took["peak_bytes"]))
            start = seconds_text(statistics.median(took["first_step"]))
            speed = f"{statistics.median(took['tokens_per_second']):,.0f}"
            parts = [seconds_text(statistics.median(took[part])) for part in PARTS if part in took]
            rows.append([case["dtype"], CONTESTANTS[name], *ratios, speed, peak, start, *parts])
    parts = [part for part in PARTS if part in first["contestants"]["disha"]]
    header = ("weights", "", "step / LoRA", "memory / LoRA", "tokens / s", "peak memory")
    about = EVALUATED.format(first["held_out"]) if parts else ""
    filled = [
        [f"{size} rows", *(f"{100 * part:.1f}%" for part in parts.values())]
        for size, parts in padding["parts"].items()
    ]
    peaks = {name: bytes_text(peak) for name, peak in loss["peak_bytes"].items()}
    faster = Spread.of(paired_ratios(loss["seconds"], "parts", "whole"))
    orders = list(next(iter(padding["parts"].values())))
    return f"""## The whole job

This table sets `disha finetune` with its defaults beside a script that a user would write with the
Trainer of `transformers` and PEFT ([its text](../benchmarks/trainer_script.py)). All train
{first["model"]} on the same {first["rows"]} rows of at most {first["length"]} tokens,
{first["batch"]} in a batch. MiSS has r = {first["r"]} and {first["trained"]["miss"]:,} trained
parameters; LoRA has rank {first["lora_rank"]} and {first["trained"]["lora"]:,}. *As they come*
means `--group_by_length False`: the batches then have as much padding as those of Trainer. *First
step* is the time from the start of the process to the end of its first step.{about} The figures are
medians and quartiles of {count_text(len(first["contestants"]["disha"]["first_step"]), "round")}.

{table((*header, "first step", *parts), rows)}
Besides the adapters, two things make the difference. First, `disha finetune` does not keep the
logits of the whole vocabulary. For {loss["tokens"]:,} tokens and {loss["words"]:,} words, the loss
and its gradient allocate {peaks["parts"]} instead of {peaks["whole"]}, and take
{spread_text(faster)} times as long. Second, its batches have less padding. This is the part of a
batch that is padding, for the demo's {padding["rows"]:,} rows of at most {padding["length"]}
tokens:

{table(("batch", *orders), filled)}"""


PARTS = ("evaluation", "saving")
EVALUATED = """ *Evaluation*
is the time of the loss on {} other rows, in batches of the default size. `disha finetune` also
evaluates before its first step, and that time is part of *first step*. *Saving* is the time to
write the adapter."""


def _over_lora(case: Case, name: str, field: str) -> Spread:
    values = {other: took[field] for other, took in case["contestants"].items()}
    return Spread.of(paired_ratios(values, name, "peft_lora"))


def _compiled(results: Results) -> str:
    cases = results["tables"]["compiled"]
    rows = []
    for case in (case for case in cases if case["what"] == "counted"):
        frozen = case["counts"][BASE]
        for name, counts in case["counts"].items():
            rows.append(
                [
                    f"{case['layout']}, {CANDIDATES[name].title}",
                    *(_beyond(name, counts, frozen, what) for what in ("loops", "products")),
                    NOTHING if name == BASE else ratio_text(counts["bytes"] / frozen["bytes"]),
                    *(str(counts[what]) for what in ("graphs", "breaks")),
                ]
            )
    header = ("", "loops", "products", "bytes / frozen", "compilations", "graph breaks")
    parts = ["## Compiled models\n\nA training step compiled by `torch.compile` with inductor.\n"]
    if rows:
        parts.append(f"{ABOUT_COUNTS}\n{table(header, rows)}")
    timed = [case for case in cases if case["what"] == "timed"]
    if timed:
        parts.append(f"{ABOUT_COMPILED}\n{_compiled_times(timed)}")
    return "\n".join(parts)


ABOUT_COUNTS = """\
Small whole models, one for each layout. *Loops* are the pieces of C++ that inductor fuses, and
*products* its calls of products and convolutions, both counted in the generated code. The row of an
adapter says how many it adds to those of the frozen model. *Bytes* are those that all of these read
and write, as inductor counts them. Each step runs twice, and adapters of disha have another scale
the second time. One compilation means that the new scale compiles nothing again. A layout has no
row for PEFT if PEFT does not adapt it, or if torch can't compile it.
"""
ABOUT_COMPILED = """\
Times of the compiled step: as a ratio to the same candidate's eager step, to the compiled step of
the frozen base, and to the compiled step of PEFT's LoRA.
"""


def _beyond(name: str, counts: Mapping[str, int], frozen: Mapping[str, int], what: str) -> str:
    return str(counts[what]) if name == BASE else f"{counts[what] - frozen[what]:+d}"


def _compiled_times(cases: Sequence[Case]) -> str:
    rows = []
    for case in cases:
        seconds, layers = case["seconds"], case.get("layers")
        size = size_title(case) + (f", {count_text(layers, 'layer')}" if layers else "")
        for name in (name for name in seconds if not name.endswith(COMPILED)):
            others = (name, BASE + COMPILED, f"peft_lora{COMPILED}")
            rows.append(
                [
                    f"{size}, {CANDIDATES[name].title}",
                    *(
                        spread_text(Spread.of(paired_ratios(seconds, name + COMPILED, other)))
                        if other in seconds and other != name + COMPILED
                        else NOTHING
                        for other in others
                    ),
                ]
            )
    return table(("", "/ eager", "/ frozen", "/ PEFT LoRA"), rows)


def _devices(results: Results) -> str:
    cases = results["tables"]["devices"]
    titles = {"bone": "Bone", "bat": "BAT"}
    rows = [
        [f"{case['layout']}, {titles[case['method']]}"]
        + [_fact_text(case["facts"][fact]) for fact in FACTS]
        for case in cases
    ]
    listed = "".join(f"- *{fact}*: {meaning}\n" for fact, meaning in FACTS.items())
    return f"""## What was checked without a GPU

{UNSEEN if results["device"] == "cpu" else ""}{ABOUT_DEVICES}
{listed}
{folded(_facts_title(cases), table(("", *FACTS), rows))}
{ABOUT_GRAPHS}"""


UNSEEN = """\
This run had no GPU, and all its times are those of a CPU. """
ABOUT_DEVICES = """\
Some facts about devices are checked on a pretended device. To torch it is a separate device, but
its memory is that of the host, and the CPU computes. So this section says nothing about speed, and
nothing about kernels that only GPUs have. Each small model runs in float32, in bfloat16, in
bfloat16 with blocks in float32, and under autocast.
"""
ABOUT_GRAPHS = """\
One case waits for the device by design: BAT on experts in a grouped product. There the host must
know how many rows each expert has, so a CUDA graph can't record the product. Compiled code and
batched products do not wait. A CUDA graph keeps the scale, the active adapters and the route of the
samples as they were when it was recorded. So record it again after a change. Compiled code reads
the scale from the device.
"""


def _facts_title(cases: Sequence[Case]) -> str:
    facts = [fact for case in cases for fact in case["facts"].values() if fact != NOT_ASKED]
    return f"{facts.count('')} of {len(facts)} facts hold"


def _fact_text(broken: str) -> str:
    return {"": "\N{CHECK MARK}", NOT_ASKED: NOTHING}.get(
        broken, f"**no**: `{' '.join(broken.split())[:80]}`"
    )


def _left_out(cases: Sequence[Case]) -> str:
    reasons = {name: why for case in cases for name, why in case["left_out"].items()}
    listed = "; ".join(f"{CANDIDATES[name].title}: {why}" for name, why in reasons.items())
    return f"Left out: {listed}.\n" if listed else ""


# --- what is not measured ------------------------------------------------------------------------

PREDICTED = {"r": 64, "batch": 1, "length": 4096}


def _on_paper() -> str:
    rows = []
    for model in cost_model.MODELS:
        for method, title in METHOD_TITLES.items():
            one = cost_model.predict(model, method, **PREDICTED)
            rows.append(
                [
                    f"{model.name}, {title}",
                    f"{one.trainable / 1e6:.0f} M",
                    bytes_text(one.state_bytes),
                    bytes_text(one.kept_bytes),
                    ratio_text(one.step_ratio),
                ]
            )
    header = ("model", "trained", "adapter and optimizer", "kept by adapters", "step / frozen")
    return f"""## Large models: calculated, not measured

The models have the sizes of Llama 2. All projections are adapted with r = {PREDICTED["r"]} in 16
bits, and a step has one sequence of {PREDICTED["length"]:,} tokens. The step is counted in
multiply-adds. *Kept* is what the adapters keep for the backward pass, without recomputing
activations.

{table(header, rows)}"""


def _targets(outcomes: Sequence[Outcome]) -> str:
    rows = [
        [
            outcome.target.title,
            f"{'<' if outcome.target.strict else '<='} {ratio_text(outcome.target.limit)}",
            spread_text(outcome.figure),
            "met" if outcome.met else "**missed**",
        ]
        for outcome in outcomes
        if outcome.figure is not None
    ]
    listed = table(("figure", "limit", "measured", ""), rows)
    return f"""## Targets

These are limits that this project sets itself. A figure without a unit is a ratio of times or of
bytes.

{folded(_score(outcomes), listed)}"""


def _score(outcomes: Sequence[Outcome]) -> str:
    counts = {met: sum(outcome.met is met for outcome in outcomes) for met in (True, False, None)}
    return (
        f"{count_text(counts[True], 'target')} met, {counts[False]} missed, {counts[None]} not "
        "measured"
    )


def _elsewhere(others: Mapping[Path, Results]) -> str:
    if not others:
        return ""
    lines = [
        f"- `{path.name}`: {_machine(results)}: {_score(judge(results['tables']))}\n"
        for path, results in others.items()
    ]
    return f"""## Other machines

These files in `benchmarks/results/` hold earlier runs. To read one as a page:
`python -m benchmarks.report benchmarks/results/NAME --docs bench-output`.

{"".join(lines)}"""


if __name__ == "__main__":
    sys.exit(main())
