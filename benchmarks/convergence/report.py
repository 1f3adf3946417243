"""`python -m benchmarks.convergence.report`: write docs/evidence.md from the results.

Every number comes from the results or the settings of the study, but for those in `REPORTED`, which
are quoted from others.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.convergence import curves
from benchmarks.convergence.costs import COSTS
from benchmarks.convergence.curves import COMPARED
from benchmarks.convergence.findings import (
    OTHER,
    Longer,
    Overall,
    TaskFindings,
    differ,
    longer,
    points,
    ratios,
    task_findings,
)
from benchmarks.convergence.methods import FULL, IDENTITY, LARGEST_DIFFERENCE, METHODS
from benchmarks.convergence.plan import LONG, STUDY, Results, Study
from benchmarks.convergence.runs import RESULTS, read_runs
from benchmarks.convergence.tasks import TASKS
from benchmarks.convergence.training import HEAD_RATE
from benchmarks.markdown import NOTHING, box, count_text, folded, table, versions_text
from benchmarks.results import read_results

PAGE, PICTURES = "evidence.md", "assets/evidence-{}.svg"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page and its pictures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convergence.report")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder to write into")
    asked = parser.parse_args(arguments)
    results, costs = read_runs(RESULTS), read_results(COSTS)
    found, long = tasks_of(STUDY, results, costs), longer(STUDY, results)
    (asked.docs / "assets").mkdir(parents=True, exist_ok=True)
    (asked.docs / PICTURES.format("verdict")).write_bytes(curves.compared(found))
    (asked.docs / PICTURES.format("longer")).write_bytes(curves.longer_training(long))
    (asked.docs / PAGE).write_text(page(results, costs, found, long), encoding="utf-8")
    print(asked.docs / PAGE)


def tasks_of(study: Study, results: Results, costs: Mapping[str, Any]) -> dict[str, TaskFindings]:
    """Return task -> its main comparison."""
    measured = {one["task"]: one for one in costs["tables"]["costs"]}
    tasks = dict.fromkeys(cell.task for cell in study.cells)
    return {task: task_findings(task, study, results, measured.get(task)) for task in tasks}


def page(
    results: Results,
    costs: Mapping[str, Any],
    found: Mapping[str, TaskFindings],
    long: Longer,
) -> str:
    """Return the page in Markdown."""
    return "\n".join(
        [
            "# How well it learns\n",
            verdict(found),
            f"![MiSS (Bone), BAT and others compared with LoRA]({PICTURES.format('verdict')})\n",
            _every_task(found),
            _longer(long),
            _how(results, costs),
        ]
    )


# --- the verdict ---------------------------------------------------------------------------------


def verdict(found: Mapping[str, TaskFindings]) -> str:
    """Return the box on top of the page, in Markdown."""
    lines = [
        _line("Quality", found, "test loss", "loss", ("better", "worse")),
        _line("Speed", found, "time of a step", None, ("faster", "slower")),
        _line("Memory", found, "memory of a step", None, ("less", "more")),
        _line("Forgetting", found, "forgetting", "forgetting", ("less", "more")),
    ]
    listed = "\n".join(f"- {line}" for line in lines)
    trained = count_text(sum(IDENTITY in one.findings for one in found.values()), "task")
    identity = f"{METHODS[IDENTITY].title} was trained in {trained}."
    most = max(TASKS[task].steps for task in found)
    return box(
        "Verdict, compared with LoRA at equal parameters",
        f"""{listed}

Each figure is divided by LoRA's; lower is better. It is the geometric mean over
{count_text(len(found), "task")}, with its 95% interval in brackets. A difference is clear if 1 is
outside the interval; in a single task, if a paired test over the seeds says so.
{identity} The models are small: none has more than 135M parameters, and SmolLM2-135M
is the Instruct model of a Q4_1 file. The training is short, at most {most} steps. Each method has
its own best learning rate.
""",
    )


def _line(
    name: str,
    found: Mapping[str, TaskFindings],
    what: str,
    key: str | None,
    sides: tuple[str, str],
) -> str:
    overall = {one: Overall.of(list(ratios(found, one, what).values())) for one in COMPARED}
    words: dict[str, list[str]] = {}
    for one, ratio in overall.items():
        word = f"clearly {sides[ratio.value > 1]}" if ratio.clear else "no clear difference"
        words.setdefault(word, []).append(METHODS[one].title)
    told = "; ".join(f"{_joined(titles)}: {word}" for word, titles in words.items())
    figures = ", ".join(f"{METHODS[one].title} {ratio}" for one, ratio in overall.items())
    text = f"**{name}. {told}.** {what.capitalize()}: {figures}."
    return text if key is None else f"{text} {_single_tasks(found, key, sides)}"


def _single_tasks(found: Mapping[str, TaskFindings], key: str, sides: tuple[str, str]) -> str:
    """Say in how many single tasks the difference is clear."""
    told = []
    for name in COMPARED:
        counts = [0, 0]
        for one in found.values():
            if name in one.findings:
                mine, others = (one.findings[n].values(key) for n in (name, OTHER))
                if differ(mine, others):
                    counts[sum(mine) > sum(others)] += 1
        parts = [f"{side} in {count}" for side, count in zip(sides, counts, strict=True) if count]
        told.append(f"{METHODS[name].title} {' and '.join(parts) or 'in none'}")
    return f"Clear in single tasks: {', '.join(told)}."


def _joined(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


# --- every task ----------------------------------------------------------------------------------


def _every_task(found: Mapping[str, TaskFindings]) -> str:
    names = [name for name in METHODS if any(name in one.findings for one in found.values())]
    rows = []
    for name in names:
        of_method = [one.findings.get(name) for one in found.values()]
        rates = [one.rate for one in of_method if one is not None]
        close = sum(
            name in one.ranked and not one.apart(name, one.ranked[0]) for one in found.values()
        )
        steps = list(ratios(found, name, "time of a step").values())
        rows.append(
            [
                METHODS[name].title,
                f"{statistics.geometric_mean(rates):.1g}",
                *(NOTHING if one is None else f"{one.mean('loss'):.3f}" for one in of_method),
                NOTHING if name == FULL else f"{close} of {len(rates)}",
                f"{statistics.geometric_mean(steps):.2f}" if steps else NOTHING,
            ]
        )
    header = ["method", "rate", *(TASKS[task].name for task in found), "best or tied", "step"]
    gaps = [one.findings["bone"].rate / one.findings[OTHER].rate for one in found.values()]
    listed = "\n".join(f"- *{TASKS[task].name}*: {TASKS[task].about}" for task in found)
    return f"""## Test loss of every method and task

The rate is the geometric mean of the best rates; *tied* means within noise of the best adapter.
*Step* is the time of a step, divided by LoRA's. The best rate of MiSS (Bone) was {min(gaps):.1g} to
{max(gaps):.1g} times LoRA's, so do not reuse a rate from LoRA:
[which rate when](choosing.md#learning-rate).

{table(header, rows)}
{folded("The tasks", listed)}"""


# --- the longer training -------------------------------------------------------------------------


class Reported(NamedTuple):
    """Correct answers in percent by others, of one or more runs with one rate for all methods."""

    source: str
    rate: float
    correct: Mapping[str, tuple[float, ...]]
    note: str


REPORTED = (
    Reported(
        "[the paper](citing.md), a Llama with 7B parameters on GSM8K",
        2e-5,
        {"lora": (40.75,), "bone": (48.16,)},
        "",
    ),
    Reported(
        "[PEFT's own comparison](https://github.com/huggingface/peft/tree/main/method_comparison), "
        "a Llama with 3B parameters on GSM8K",
        1e-4,
        {
            "lora": (47.84, 48.22, 49.05),
            "bone": (48.67, 50.72),
            "bat": (50.42, 51.63),
            "rslora": (51.33, 52.99, 53.22),
        },
        "rsLoRA has 2.5 times as many parameters there as MiSS (Bone) and BAT, and LoRA 1.25 "
        "times. Several figures are of runs with the same settings, made half a year or a year "
        "apart, so they show how much a run varies.",
    ),
)
"""Figures that are quoted from others, with larger models than those of this study."""


def _longer(found: Longer) -> str:
    task = TASKS[LONG]
    rows = [
        [
            METHODS[name].title,
            *(_at(found, name, rate) for rate in found.rates),
            f"{one.mean('loss'):.3f} at {one.rate:g}",
            f"{one.mean('forgetting') - found.base:+.3f}",
            f"{statistics.fmean(_equal(found, name)):.3f}",
        ]
        for name, one in found.own.items()
    ]
    header = ["method", *(f"{rate:g}" for rate in found.rates), "own rate", "forgetting",
              "at equal forgetting"]  # fmt: skip
    return f"""## A longer training, with one rate for all

{task.steps} steps of {task.batch} rows, no row twice, r = {task.r}.
{_leads(found)} Each at its own rate, {METHODS["bone"].title} is {_gap(found, "bone", OTHER)}, and
{METHODS[IDENTITY].title}, which starts as MiSS (Bone) and trains A too, is
{_gap(found, IDENTITY, "bone")}.

![The longer training]({PICTURES.format("longer")})

{table(header, rows)}
The loss on test rows; the columns of rates have the first seed, the others the mean over the seeds.
*Forgetting* is the rise of the loss on text that the base itself wrote, from {found.base:.3f}. A
runtime scale below 1 takes back a part of learning and of forgetting: the last column scales each
method until it forgets no more than the least forgetful one, {_least(found)}.

{_sizes(found)}
### Beside what others report

Others count correct answers, so higher is better; here it is the test loss.

{_reported(found)}"""


def _at(found: Longer, name: str, rate: float) -> str:
    loss = found.loss(name, rate)
    return NOTHING if loss is None else "diverged" if math.isinf(loss) else f"{loss:.3f}"


def _leads(found: Longer) -> str:
    """Say at which rates MiSS is lower than LoRA."""
    pairs = [(r, found.loss("bone", r), found.loss(OTHER, r)) for r in found.rates]
    known = [(f"{r:g}", one < other) for r, one, other in pairs if None not in (one, other)]
    lower, others = ([r for r, less in known if less is which] for which in (True, False))
    return (
        f"**With one rate for all, the loss of MiSS (Bone) is lower than LoRA's at "
        f"{_joined(lower) if lower else 'none'}, and not at {_joined(others) if others else 'any'}"
        ".**"
    )


def _gap(found: Longer, one: str, other: str) -> str:
    mine, others = (found.own[name].values("loss") for name in (one, other))
    gap = statistics.fmean(mine) - statistics.fmean(others)
    noise = "beyond" if differ(mine, others) else "within"
    side = "lower" if gap < 0 else "higher"
    return f"{abs(gap):.3f} {side} than {METHODS[other].title}, {noise} noise"


def _forgotten(found: Longer, name: str) -> float:
    return statistics.fmean(points(record)[-1].elsewhere for record in found.own[name].records)


def _equal(found: Longer, name: str) -> list[float]:
    limit = min(_forgotten(found, other) for other in found.own)
    return [loss for loss in found.equal_losses(name, limit) if math.isfinite(loss)]


def _least(found: Longer) -> str:
    return METHODS[min(found.own, key=lambda name: _forgotten(found, name))].title


def _sizes(found: Longer) -> str:
    both = sorted(set(found.sizes["bone"]) & set(found.sizes[OTHER]))
    rows = [
        [METHODS[name].title, *(f"{found.sizes[name][r]:.3f}" for r in both)]
        for name in ("bone", OTHER)
    ]
    about = f"Both keep the rate that is best at r = {TASKS[LONG].r}."
    return f"{table(['method', *(f'r = {r}' for r in both)], rows)}\n{about}\n"


def _reported(found: Longer) -> str:
    methods = (OTHER, "bone", "bat", "rslora")
    rows = []
    for one in REPORTED:
        told = (" / ".join(f"{value:.2f}%" for value in one.correct.get(name, ())) or NOTHING
                for name in methods)  # fmt: skip
        losses = found.losses(one.rate)
        rows.append([f"{one.rate:g}: {one.source}", *told])
        rows.append([f"{one.rate:g}: here", *(f"{losses[name]:.3f}" for name in methods)])
    notes = "\n".join(one.note for one in REPORTED if one.note)
    return f"{table(['one rate for all', *(METHODS[n].title for n in methods)], rows)}\n{notes}\n"


# --- how it was measured -------------------------------------------------------------------------


def _how(results: Results, costs: Mapping[str, Any]) -> str:
    hours = sum(record["seconds"] for record in results.values()) / 3600
    machine = costs["machine"]
    settings = "; ".join(f"{method.title}: {method.about}" for method in METHODS.values())
    return f"""## How it was measured

- **Equal parameters**: as many as MiSS (Bone), within {LARGEST_DIFFERENCE:.0%}. Full fine-tuning of
  the same layers is shown for reference.
- **Equal training**: the same rows in the same order, AdamW without decay, clipping or dropout, a
  short warm-up and a cosine to zero. New heads train at {HEAD_RATE:g} with every method.
- **Own rates**: at least four, a factor of about three apart, with one beyond if the best is at an
  edge. The loss on validation rows with one seed chooses; then {len(STUDY.seeds)} seeds run. The
  tables have the loss on test rows, on which no choice depends.
- **Noise**: two methods differ if a paired t-test over seeds says so at 95%. With three seeds, only
  a large difference passes; among many pairs, some pass by chance.
- **Forgetting** is measured after training, on something that the base could do.
- **Time and memory of a step** are those of these tasks: short rows, an optimizer, and in the
  longer training frozen weights in bfloat16 with adapters in float32. A step of MiSS (Bone) takes
  {_range(costs)} of LoRA's here. In [speed and memory](performance.md) it is closer to 1: there a
  step has more tokens and no optimizer, and adapters have the dtype of the base.
- **Settings**: {settings}.

`python -m benchmarks.convergence.report` writes this page from `benchmarks/results/`:
{len(results)} runs, {hours:.1f} hours on one core that other work shared. The figures of the paper
and of PEFT are quoted. Costs: {machine["processor"]}, {count_text(machine["threads"], "thread")};
{versions_text(costs)}.
"""


def _range(costs: Mapping[str, Any]) -> str:
    found = tasks_of(STUDY, {}, costs)
    values = [one.costs["bone"].ratio for one in found.values()]
    return f"{min(values):.2f} to {max(values):.2f}"


if __name__ == "__main__":
    main()
