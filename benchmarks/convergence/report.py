"""`python -m benchmarks.convergence.report`: write docs/evidence.md from the results.

Every number on the page comes from the results or from the settings of the study.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.convergence import curves, longer
from benchmarks.convergence.costs import COSTS
from benchmarks.convergence.findings import (
    Finding,
    Mean,
    TaskFindings,
    finding,
    task_findings,
)
from benchmarks.convergence.methods import FULL, LARGEST_DIFFERENCE, METHODS
from benchmarks.convergence.plan import STUDY, Results, Study, main_cell
from benchmarks.convergence.runs import RESULTS, Cell, read_runs
from benchmarks.convergence.tasks import TASKS
from benchmarks.convergence.training import HEAD_RATE
from benchmarks.convergence.verdict import COMPARED, verdict
from benchmarks.markdown import bytes_text, folded, seconds_text, table

__all__ = ["main", "write"]

PAGE, PICTURES = "evidence.md", "assets/evidence-{}.svg"
NOTHING = "-"
HOW = "How it was measured"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and its pictures.

    Args:
        arguments: of the command line; the process's by default.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convergence.report")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file of results")
    parser.add_argument("--costs", type=Path, default=COSTS, help="the file of costs")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder to write into")
    asked = parser.parse_args(arguments)
    for path in write(STUDY, asked.results, asked.costs, asked.docs):
        print(path)
    return 0


def write(study: Study, results_file: Path, costs_file: Path, docs: Path) -> list[Path]:
    """Write the page and its pictures, and return their paths.

    Args:
        study: what was planned.
        results_file: with the results of the runs.
        costs_file: with the costs of a step; it may be missing.
        docs: the folder to write into.
    """
    results, costs = read_runs(results_file), _read_costs(costs_file)
    found = _found(study, results, costs)
    shown = {task: one for task, one in found.items() if _is_complete(one)}
    pictures = {PICTURES.format(task): curves.curves(task, one) for task, one in shown.items()}
    if shown:
        pictures[PICTURES.format("verdict")] = curves.compared(shown)
        pictures[PICTURES.format("rates")] = curves.rates(shown)
        pictures[PICTURES.format("gradients")] = curves.gradients(shown)
    long = longer.of_results(study, results)
    if long.there:
        pictures[PICTURES.format("longer")] = curves.longer(long)
    for name, svg in pictures.items():
        (docs / name).parent.mkdir(parents=True, exist_ok=True)
        (docs / name).write_bytes(svg)
    (docs / PAGE).write_text(_page(study, results, costs, found, shown, long), encoding="utf-8")
    return [docs / name for name in (PAGE, *pictures)]


def _read_costs(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _found(study: Study, results: Results, costs: Mapping[str, Any]) -> dict[str, TaskFindings]:
    measured = {one["task"]: one for one in costs.get("tables", {}).get("costs", ())}
    return {
        task: task_findings(
            [cell for cell in study.cells if cell.task == task and _is_main(cell)],
            study,
            results,
            measured.get(task),
        )
        for task in dict.fromkeys(cell.task for cell in study.cells)
    }


def _is_complete(found: TaskFindings) -> bool:
    """Whether the methods of the verdict are finished, and there is LoRA's to compare with."""
    return "lora" in found.findings and set(COMPARED).isdisjoint(found.unfinished)


def _is_main(cell: Cell) -> bool:
    return cell == main_cell(cell.task, cell.method)


# --- the page ------------------------------------------------------------------------------------


def _page(
    study: Study,
    results: Results,
    costs: Mapping[str, Any],
    found: Mapping[str, TaskFindings],
    shown: Mapping[str, TaskFindings],
    long: longer.Longer,
) -> str:
    parts = [
        "# How well it learns\n",
        "This page compares how well [Bone, tile and BAT](choosing.md#method), LoRA and its "
        "variants learn the same tasks. "
        "Read it before you choose a method and a learning rate. The box has the answer in short, "
        f"and [the last sections](#{HOW.lower().replace(' ', '-')}) say how it was measured.\n",
        verdict(shown),
        f"![Bone and BAT compared with LoRA]({PICTURES.format('verdict')})\n" if shown else "",
        _incomplete(found, shown),
        _start_with(shown),
        longer.longer(long, PICTURES.format("longer")) if long.there + long.missing else "",
        _sensitivity(shown) if shown else "",
        *(_task(task, one) for task, one in shown.items()),
    ]
    if shown:
        parts += [_gradients(), _ablations(study, results)]
    parts += [f"## {HOW}\n", _protocol(study), _provenance(results, costs)]
    return "\n".join(part for part in parts if part)


def _incomplete(found: Mapping[str, TaskFindings], shown: Mapping[str, TaskFindings]) -> str:
    """List what is missing from the page, and why."""
    lines = []
    for task, one in found.items():
        if task not in shown:
            lines.append(f"- **{TASKS[task].title}.** Not finished yet.")
        for what, methods in (
            ("Not finished yet", one.unfinished if task in shown else ()),
            ("Diverged at its best learning rate with at least one seed", one.diverged),
        ):
            names = ", ".join(METHODS[name].title for name in methods)
            lines += [f"- {what}, {TASKS[task].title}: {names}."] if names else []
    return "\n".join(lines) + "\n" if lines else ""


def _in_short(found: TaskFindings) -> str:
    sentences = [
        _faster(found),
        _lower(found, "bone", "lora"),
        _lower(found, "bat", "bone"),
        _step_costs(found),
    ]
    return " ".join(filter(None, sentences)) + "\n"


def _faster(found: TaskFindings) -> str:
    """Say when Bone reached the loss at which LoRA ended."""
    if "bone" not in found.findings:
        return ""
    bone, lora = (found.findings[name].steps_to(found.goal) for name in ("bone", "lora"))
    last = found.findings["lora"].steps[-1]
    if bone is None:
        text = f"Bone did not reach LoRA's final validation loss in {last} steps."
    else:
        text = f"Bone reached LoRA's final validation loss after {bone} of {last} steps, LoRA "
        text += f"itself after {lora}."
    near = [found.findings[name].steps_to(found.near_goal) for name in ("bone", "lora")]
    if near[0] is not None:
        text += f" Bone reached 95% of LoRA's improvement in {near[0]} steps, LoRA in {near[1]}."
    else:
        text += " It did not reach 95% of LoRA's improvement either."
    return text


def _lower(found: TaskFindings, one: str, other: str) -> str:
    """Say which of two methods ended lower on the test rows."""
    if one not in found.findings or other not in found.findings:
        return ""
    losses = [found.findings[name].mean("loss").value for name in (one, other)]
    figures = f"{METHODS[one].title} {losses[0]:.3f}, {METHODS[other].title} {losses[1]:.3f}"
    if not found.apart(one, other):
        return f"Test loss: {figures}; the difference is within noise."
    better = METHODS[one if losses[0] < losses[1] else other].title
    return f"Test loss: {figures}; {better} is better, beyond noise."


def _step_costs(found: TaskFindings) -> str:
    """Say how long a step takes, compared with LoRA's."""
    if not {"bone", "bat"} <= set(found.costs):
        return ""
    bone, bat = (f"{found.costs[name].ratio:.2f}" for name in ("bone", "bat"))
    return f"A step takes {bone} (Bone) and {bat} (BAT) times as long as a step of LoRA."


def _start_with(shown: Mapping[str, TaskFindings]) -> str:
    if not shown:
        return ""
    methods = [name for name in METHODS if any(name in one.findings for one in shown.values())]
    costed = any(one.costs for one in shown.values())
    rows = []
    for name in methods:
        rates = [one.findings[name].rate for one in shown.values() if name in one.findings]
        ranks = [
            str(one.ranked.index(name) + 1) if name in one.ranked else NOTHING
            for one in shown.values()
        ]
        close = sum(
            name in one.ranked and not one.apart(name, one.ranked[0]) for one in shown.values()
        )
        rows.append([
            METHODS[name].title,
            f"{min(rates):g} to {max(rates):g}" if len(set(rates)) > 1 else f"{rates[0]:g}",
            f"{statistics.geometric_mean(rates):.1g}",
            ", ".join(ranks) if {*ranks} != {NOTHING} else NOTHING,
            str(close) if {*ranks} != {NOTHING} else NOTHING,
        ])  # fmt: skip
        if costed:
            ratios = [
                f"{one.costs[name].ratio:.2f}" if name in one.costs else NOTHING
                for one in shown.values()
            ]
            rows[-1].append(", ".join(ratios))
    header = ["method", "best learning rates", "geometric mean", "rank by test loss, by task",
              "tasks where best or tied"]  # fmt: skip
    if costed:
        header.append("step / LoRA, by task")
    tasks = "; ".join(TASKS[task].title for task in shown)
    return "\n".join([
        "## Which method and learning rate to start with\n",
        f"*By task* means one number for each task, in this order: {tasks}.\n",
        table(header, rows),
        _advice(shown),
    ])  # fmt: skip


def _advice(shown: Mapping[str, TaskFindings]) -> str:
    """Say what follows from the table, by rules that do not depend on its numbers."""
    names = {name for one in shown.values() for name in one.ranked}
    close = {
        name: sum(name in one.ranked and not one.apart(name, one.ranked[0])
                  for one in shown.values())
        for name in sorted(names)
    }  # fmt: skip
    most = max(close.values())
    first = [METHODS[name].title for name in METHODS if close.get(name) == most]
    text = (
        f"Most often best, or tied with the best: {', '.join(first)} ({most} of {len(shown)} "
        "tasks). *Tied* means that the difference is within noise; a method whose seeds differ "
        "widely ties more easily. Start with the cheapest of these that your runtime can serve, at "
        "the mean rate of the table. Then try a third of that rate, and three times that rate."
    )
    partly = [METHODS[name].title for name in METHODS if name in names
              and not all(name in one.ranked for one in shown.values())]  # fmt: skip
    if partly:
        text += f" Not every task has {', '.join(partly)}."
    ratios = [
        one.findings["bone"].rate / one.findings["lora"].rate
        for one in shown.values()
        if "bone" in one.findings
    ]
    if ratios:
        low, high = f"{min(ratios):.1g}", f"{max(ratios):.1g}"
        span = low if low == high else f"{low} to {high}"
        text += f" Bone's best rate was {span} times LoRA's"
        text += "." if low == high == "1" else ", so do not reuse a learning rate from LoRA."
    text += " Larger models and longer runs need lower rates: [which rate when]"
    return f"{text}(choosing.md#learning-rate).\n"


def _protocol(study: Study) -> str:
    parts = [
        "- **Equal parameters.** Every method has as many trained parameters as Bone, within "
        f"{LARGEST_DIFFERENCE:.0%}. Where one rank for all layers would miss that, the first "
        "layers get one more. Full fine-tuning of the same layers is shown for reference.",
        "- **Equal training.** Every method gets the same rows in the same order, and the same "
        "number of steps. All use AdamW without weight decay, clipping or dropout, with a short "
        f"warm-up and a cosine to zero. New heads train at {HEAD_RATE:g} with every method.",
        "- **Each method has its own learning rate.** At least four rates are tried, a factor of "
        "about three apart. If the best rate is the lowest or the highest, the next one beyond it "
        "is tried too. The rate is chosen by the final loss on validation rows with one seed, and "
        f"then run with {len(study.seeds)} seeds. The tables report the loss on test rows. No "
        "choice depends on these rows.",
        "- **Noise.** Tables show the mean over seeds and the standard deviation of a seed. Two "
        "methods differ if a paired t-test over seeds says so at 95%. With three seeds, only a "
        "large difference passes this test. Among many pairs, some pass by chance.",
        "- **Steps to a loss** are counted on the mean validation curve of the seeds. LoRA's "
        "improvement goes from its validation loss before training to its last.",
        "- **Settings of the methods.** "
        + "; ".join(f"{method.title}: {method.about}" for method in METHODS.values())
        + ".",
        "- **Rank and size of the update.** dW is the weight that a layer computes with, minus the "
        "base weight. It is read from the outputs for unit vectors, in the same way for every "
        "library. Its effective rank is the exponential of the entropy of its normalised singular "
        "values (Roy and Vetterli, 2007). Rank and size are means over layers.",
        "- **Forgetting** is the last column of each second table. It measures something that the "
        "base could do, before and after training. Lower means that the model forgot less.",
        "- **Seconds and memory** are measured separately, with all methods in one process, "
        "because the training runs share the machine.",
    ]
    return "\n".join(parts) + "\n"


def _task(name: str, found: TaskFindings) -> str:
    task = TASKS[name]
    header = ["method", "parameters", "rate", "test loss", task.exact_name,
              "steps to LoRA's final loss", "steps to 95% of its improvement"]  # fmt: skip
    rows = [_row(method, found) for method in found.findings]
    if found.costs:
        header += ["time to LoRA's final loss", "time of a step, / LoRA", "peak memory"]
        rows = [_row(method, found) + _cost(method, found) for method in found.findings]
    more = ["method", "gradient, first steps", "effective rank of dW", "norm of dW / W",
            task.forgetting_name]  # fmt: skip
    lora = found.findings["lora"]
    return "\n".join([
        f"## {task.title}\n",
        f"{task.about} Training takes {task.steps} steps of {task.batch} rows, with r = {task.r}. "
        f"A tile has r_out = {task.r_out}, and the r that gives it as many parameters. The "
        f"validation loss is measured every {task.evaluate_every} steps. It starts at "
        f"{lora.curve[0]:.3f}; with LoRA it ends at {lora.curve[-1]:.3f}.\n",
        _in_short(found),
        f"![Validation loss of {task.title}]({PICTURES.format(name)})\n",
        folded(
            "Loss, rate, time and memory of each method",
            table(header, rows)
            + "\nBold marks the **lowest** test loss of the adapters, italics the "
            "*second-lowest*. = means tied with the lowest.\n",
        ),
        folded(
            "Gradient, rank and size of the update, forgetting",
            table(more, [_more(method, found) for method in found.findings]),
        ),
    ])  # fmt: skip


def _row(method: str, found: TaskFindings) -> list[str]:
    one = found.findings[method]
    return [
        METHODS[method].title,
        f"{one.parameters:,}",
        f"{one.rate:g}",
        _marked(method, found),
        f"{one.mean('exact').value:.1%}",
        _number(one.steps_to(found.goal)),
        _number(one.steps_to(found.near_goal)),
    ]


def _cost(method: str, found: TaskFindings) -> list[str]:
    cost, seconds = found.costs.get(method), found.seconds_to(method, found.goal)
    return [
        NOTHING if seconds is None else seconds_text(seconds),
        NOTHING if cost is None else f"{seconds_text(cost.seconds)}, {cost.ratio:.2f}",
        NOTHING if cost is None else bytes_text(cost.peak_bytes),
    ]


def _more(method: str, found: TaskFindings) -> list[str]:
    one = found.findings[method]
    before, after = one.forgetting
    return [
        METHODS[method].title,
        f"{one.early_gradient.value:.3g}",
        f"{one.mean('effective_rank').value:.1f}",
        f"{one.mean('relative_norm').value:.2g}",
        f"{before:.3f} to {_mean_text(after)}",
    ]


def _marked(method: str, found: TaskFindings) -> str:
    text = _mean_text(found.findings[method].mean("loss"))
    if method == FULL:
        return text
    place = found.ranked.index(method)
    text = f"**{text}**" if place == 0 else f"*{text}*" if place == 1 else text
    return text if place == 0 or found.apart(method, found.ranked[0]) else f"{text} ="


def _mean_text(mean: Mean) -> str:
    return f"{mean.value:.3f} ± {mean.deviation:.3f}"


def _number(value: int | None) -> str:
    return "never" if value is None else str(value)


def _sensitivity(shown: Mapping[str, TaskFindings]) -> str:
    return "\n".join([
        "## How much the learning rate matters\n",
        "The picture shows the final validation loss at every learning rate that was tried, with "
        "the first seed.\n",
        f"![Validation loss by learning rate]({PICTURES.format('rates')})\n",
        folded(
            "The same as tables",
            "\n".join(_rate_table(task, found) for task, found in shown.items()),
        ),
    ])  # fmt: skip


def _rate_table(task: str, found: TaskFindings) -> str:
    rates = sorted({rate for one in found.findings.values() for rate in one.searched})
    rows = [
        [METHODS[name].title, *(_tried(one, rate) for rate in rates)]
        for name, one in found.findings.items()
    ]
    return f"{TASKS[task].title}:\n\n" + table(["method", *(f"{r:g}" for r in rates)], rows)


def _tried(one: Finding, rate: float) -> str:
    loss = one.searched.get(rate)
    if loss is None:
        return ""
    text = "diverged" if loss == float("inf") else f"{loss:.3f}"
    return f"**{text}**" if rate == one.rate else text


def _gradients() -> str:
    return "\n".join([
        "## The first gradients\n",
        "The picture shows the norm of the gradient of all trained parameters, at the best rate. A "
        "larger norm is not better, because methods are parametrised differently, and AdamW makes "
        "equal steps.\n",
        f"![Gradient norms]({PICTURES.format('gradients')})\n",
    ])  # fmt: skip


def _ablations(study: Study, results: Results) -> str:
    parts = []
    for task in dict.fromkeys(cell.task for cell in study.cells):
        found = [
            one
            for cell in study.cells
            if cell.task == task and cell.method in ("bone", "tile", "bat", "lora")
            and cell not in study.leaders
            and (one := finding(cell, study, results)) is not None
        ]  # fmt: skip
        if not all(_is_main(one.cell) for one in found):
            rows = [
                [METHODS[one.cell.method].title, *_sizes(one.cell), f"{one.parameters:,}",
                 f"{one.rate:g}", _mean_text(one.mean("loss")), f"{one.mean('exact').value:.1%}"]
                for one in found
            ]  # fmt: skip
            header = ["method", "r", "r_out", "layers", "blocks", "parameters", "rate", "test loss",
                      TASKS[task].exact_name]  # fmt: skip
            parts.append(folded(TASKS[task].title, table(header, rows)))
    if not parts:
        return ""
    about = (
        "Each row has its own search for the learning rate, and its own seeds. r is that of a Bone "
        "adapter with as many parameters. A tile with another r_out gets the r that keeps the "
        "number of parameters equal.\n"
    )
    return "\n".join(["## r, layers, tiles and dtype\n", about, *parts])


def _sizes(cell: Cell) -> list[str]:
    r_out = NOTHING if cell.r_out is None else str(cell.r_out)
    return [str(cell.r), r_out, cell.layers, cell.dtype]


def _provenance(results: Results, costs: Mapping[str, Any]) -> str:
    seconds = sum(record["seconds"] for record in results.values())
    text = (
        "`python -m benchmarks.convergence.report` writes this page from the results of "
        "`python -m benchmarks.convergence`; no number is typed by hand. "
        f"{len(results)} runs, {seconds / 3600:.1f} hours on one core that other work shared. "
        "Each run is a line of `benchmarks/results/convergence.jsonl`."
    )
    if costs:
        machine, versions = costs["machine"], costs["versions"]
        text += (
            f" Costs were measured on {machine['processor']} with {machine['threads']} threads "
            f"({costs['device']}): "
            + ", ".join(f"{name} {version}" for name, version in versions.items())
            + "."
        )
    return f"## Where the numbers come from\n\n{text}\n"


if __name__ == "__main__":
    sys.exit(main())
