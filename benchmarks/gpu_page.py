"""`python -m benchmarks.gpu_page FILE`: write the page and README's table from a run of a GPU.

The file is one of `python -m benchmarks.gpu`. What it gives stands between two marks on a page
beside the results, and in README. A run on a processor is called so, and gives README no table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.candidates import BASE, CANDIDATES
from benchmarks.compiled import COMPILED
from benchmarks.gpu import TIMED
from benchmarks.markdown import (
    NOTHING,
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
    size_text,
    table,
)
from benchmarks.results import read_results, write_whole
from benchmarks.roofline import floor

Results = Mapping[str, Any]

PAGE, README = Path("benchmarks/results/gpu.md"), Path("README.md")
MARKS = {
    PAGE: (
        "<!-- written by python -m benchmarks.gpu_page -->\n\n",
        "\n<!-- end of what it writes -->",
    ),
    README: ("<!-- gpu -->", "<!-- /gpu -->"),
}
"""What stands before and after the text in each file."""
OTHER = "peft_lora"
SUMMARISED = ("bone", "bat", "peft_miss", "loralib")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page and README."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_page", description=__doc__)
    parser.add_argument("results", type=Path, help="a file of `python -m benchmarks.gpu`")
    parser.add_argument("--root", type=Path, default=Path(), help="folder of README and benchmarks")
    asked = parser.parse_args(arguments)
    results = read_results(asked.results)
    for name, text in ((PAGE, page(results)), (README, readme(results))):
        path = asked.root / name
        write_whole(path, replace_between(path.read_text(encoding="utf-8"), text, *MARKS[name]))
        print(path)


def on_processor(results: Results) -> bool:
    """Return whether the run was on a processor."""
    return not results["accelerator"] and results["device"] == "cpu"


def readme(results: Results) -> str:
    """Return what README says: figures of a GPU, or that there are none."""
    if on_processor(results):
        return "**No GPU has run this yet**: everything was tested and measured on CPUs."
    header, rows = summary(results)
    about = f"Of GPUs, one has run. {results['device']}, divided by PEFT's LoRA"
    return f"{about} ([more](benchmarks/results/gpu.md)):\n\n{table(header, rows)}"


def page(results: Results) -> str:
    """Return what the page shows of a run."""
    tables = results["tables"]
    sections = [SECTIONS[name](tables[name]) for name in SECTIONS if name in tables]
    told = {**results["failed"], **failed_cases(tables)}
    failed = "".join(f"- {name}: {why}\n" for name, why in told.items())
    if failed:
        sections.append(f"## What failed\n\n{failed}")
    return "\n".join([head(results), *sections, f"## The run\n\n{run_text(results)}\n"])


def head(results: Results) -> str:
    """Return the box on top: where it ran, and the summary."""
    if on_processor(results):
        return box(
            "Measured on a *processor*",
            "These figures are of a **processor**, and of tiny sizes. They show that each part of "
            "the command runs. They say nothing about a GPU, and nothing about speed.",
        )
    header, rows = summary(results)
    return box(f"{results['device']}: divided by PEFT's LoRA", table(header, rows))


def summary(results: Results) -> tuple[list[str], list[list[str]]]:
    """Return a table of the largest case of each kind, divided by PEFT's LoRA."""
    header = ["", *(CANDIDATES[name].title for name in SUMMARISED)]
    rows = []
    for name, title in (
        ("step", "training step of a layer"),
        ("model", "training step of a model"),
        ("decoding", "few tokens"),
    ):
        for suffix, way in (("", "eager"), (COMPILED, "compiled")):
            cases = results["tables"].get(name, [])
            if cases:
                case = cases[-1] if name == "step" else cases[0]
                cells = [divided_text(case, one + suffix, OTHER + suffix) for one in SUMMARISED]
                rows.append([f"{title}, {size_text(case)}, {way}", *cells])
    return header, rows


def failed_cases(tables: Mapping[str, Sequence[Case]]) -> dict[str, str]:
    """Return why a candidate is missing in a case."""
    found = {}
    for name, cases in tables.items():
        for case in cases:
            for candidate, why in case.get("missing", {}).items():
                found[f"{name}, {size_text(case)}, {candidate}"] = why
    return found


def timed_rows(cases: Sequence[Case], suffix: str) -> list[list[str]]:
    """Return the times of the frozen base, and those of the others divided by them."""
    base = BASE + suffix
    rows = [["frozen", *(median_text(case, base) for case in cases)]]
    for name in TIMED[1:]:
        ratios = [divided_text(case, name + suffix, base) for case in cases]
        rows.append([CANDIDATES[name].title, *ratios])
    return rows


def section(title: str, about: str, *tables: tuple[str, str]) -> str:
    """Return a section with tables, each under a line."""
    text = "\n".join(f"{line}:\n\n{shown}" for line, shown in tables)
    return f"## {title}\n\n{about}\n\n{text}"


def step(cases: Sequence[Case]) -> str:
    header = ["", *map(size_text, cases)]
    roofline = []
    for method in ("bone", "bat"):
        floors = [f"*{ratio_text(floor('step', case, method))}*" for case in cases]
        roofline.append([f"*roofline {CANDIDATES[method].title.removeprefix('disha ')}*", *floors])
    frozen, *others = timed_rows(cases, "")
    kept = []
    for name in TIMED:
        shown = [bytes_text(case["kept_bytes"][name]) for case in cases]
        kept.append([CANDIDATES[name].title, *shown])
    return section(
        "Training step of one linear layer",
        "Forward and backward, with the gradient of the input, divided by the frozen layer. "
        "*Compiled* is divided by the frozen layer, compiled. *Kept* is what autograd keeps for "
        "the backward pass, *peak* the most that the allocator gives out in a step.",
        ("Eager", table(header, [frozen, *roofline, *others])),
        ("Compiled", table(header, timed_rows(cases, COMPILED))),
        ("Kept", table(header, kept)),
        ("Peak", table(header, peak_rows(cases, ""))),
        ("Peak, compiled", table(header, peak_rows(cases, COMPILED))),
    )


def peak_rows(cases: Sequence[Case], suffix: str) -> list[list[str]]:
    """Return the peaks of each candidate."""
    rows = []
    for name in TIMED:
        peaks = [case["peak_bytes"].get(name + suffix) for case in cases]
        shown = [NOTHING if peak is None else bytes_text(peak) for peak in peaks]
        rows.append([CANDIDATES[name].title, *shown])
    return rows


def decoding(cases: Sequence[Case]) -> str:
    header = ["", *map(size_text, cases)]
    return section(
        "Forward of a few tokens",
        f"Without gradients, through {cases[0]['layers']} layers with weights of their own, "
        "divided by the frozen layers. On CUDA, *compiled* records a graph.",
        ("Eager", table(header, timed_rows(cases, ""))),
        ("Compiled", table(header, timed_rows(cases, COMPILED))),
    )


def model(cases: Sequence[Case]) -> str:
    header = ["", *map(size_text, cases)]
    return section(
        "Training step of a language model",
        "The seven projections of every layer adapted, loss on every token, divided by the frozen "
        "model.",
        ("Eager", table(header, timed_rows(cases, ""))),
        ("Compiled", table(header, timed_rows(cases, COMPILED))),
        ("Peak", table(header, peak_rows(cases, ""))),
    )


def finetune(cases: Sequence[Case]) -> str:
    (case,) = cases
    first, *_, last = case["losses"].values()
    peak = case["peak_bytes"]
    memory = ""
    if peak is not None:
        memory = f" The allocator gave out {bytes_text(peak)} at most."
    settings = ", ".join(f"{name} {value}" for name, value in case["settings"].items())
    return (
        f"## Fine-tuning by the command\n\n`disha finetune` with {case['model']}: "
        f"{count_text(case['steps'], 'step')} in {seconds_text(case['seconds'])}, loss {first:.3f} "
        f"before and {last:.3f} after; {case['proof']['loaded']:.3f} with the saved file in the "
        f"base loaded anew.{memory} Settings: {settings}.\n"
    )


def tests(cases: Sequence[Case]) -> str:
    (case,) = cases
    listed = "".join(f"\n- {line}" for line in case["not_passed"])
    shown = f"\n{listed}\n" if listed else "\n"
    return f"## Tests\n\n`pytest -m cuda`, on this device: {case['said']}.{shown}"


SECTIONS: Mapping[str, Callable[[Sequence[Case]], str]] = {
    "tests": tests,
    "step": step,
    "decoding": decoding,
    "model": model,
    "finetune": finetune,
}


if __name__ == "__main__":
    sys.exit(main())
