"""`python -m benchmarks.convergence.report`: write what the results say.

The verdict stands between two marks in docs/evidence.md, and all tables beside the results.

Every number comes from the results or the settings of the study, but for those in `REPORTED`, which
are quoted from others.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.convergence import curves
from benchmarks.convergence.costs import COSTS
from benchmarks.convergence.curves import COMPARED
from benchmarks.convergence.findings import (
    KEPT,
    OTHER,
    Longer,
    Overall,
    Point,
    TaskFindings,
    at_forgetting,
    differ,
    longer,
    losses_at,
    points,
    ratios,
    task_findings,
)
from benchmarks.convergence.groups_report import beside_groups, decided, section
from benchmarks.convergence.methods import FULL, LARGEST_DIFFERENCE, MATRICES, METHODS, SHIRA
from benchmarks.convergence.plan import LONG, MATRIX_SEEDS, MILD, STUDY, Results, Study, main_cell
from benchmarks.convergence.runs import RESULTS, read_runs
from benchmarks.convergence.tasks import TASKS
from benchmarks.convergence.training import HEAD_RATE
from benchmarks.markdown import (
    NOTHING,
    box,
    count_text,
    folded,
    replace_between,
    table,
    versions_text,
)
from benchmarks.results import read_results
from disha.version import __version__

WIDTHS = {"digits": 64, "packages": 384}
"""Inputs of a square layer; the language model has 576."""
PAGE, TABLES = "docs/evidence.md", "benchmarks/results/learning.md"
PICTURES = "assets/evidence-{}.svg"
MARKS = (
    "<!-- written by python -m benchmarks.convergence.report -->\n\n",
    "\n<!-- end of what it writes -->",
)
"""What stands before and after the verdict on its page."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the verdict, the tables and the pictures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convergence.report")
    parser.add_argument("--root", type=Path, default=Path(), help="folder of docs and benchmarks")
    root = parser.parse_args(arguments).root
    results, costs = read_runs(RESULTS), read_results(COSTS)
    found, long = tasks_of(STUDY, results, costs), longer(STUDY, results)
    drawn = {
        "verdict": curves.compared(found),
        "longer": curves.longer_training(long),
        "rates": curves.rates(long),
        "groups": curves.with_groups(beside_groups(STUDY, results)),
    }
    for name, picture in drawn.items():
        (root / "docs" / PICTURES.format(name)).write_bytes(picture)
    shown = (root / PAGE).read_text(encoding="utf-8")
    told = replace_between(shown, summary(results, found, long), *MARKS)
    (root / PAGE).write_text(told, encoding="utf-8")
    (root / TABLES).write_text(page(results, costs, found, long), encoding="utf-8")
    print(root / PAGE, root / TABLES)


def tasks_of(study: Study, results: Results, costs: Mapping[str, Any]) -> dict[str, TaskFindings]:
    """Return task -> its main comparison."""
    measured = {one["task"]: one for one in costs["tables"]["costs"]}
    tasks = dict.fromkeys(cell.task for cell in study.cells)
    return {task: task_findings(task, study, results, measured.get(task)) for task in tasks}


def summary(results: Results, found: Mapping[str, TaskFindings], long: Longer) -> str:
    """Return what docs/evidence.md shows of the results, in Markdown."""
    return "\n".join(
        [
            verdict(found, long),
            f"![MiSS, BAT and others compared with LoRA]({PICTURES.format('verdict')})\n",
            _longer(long),
            decided(STUDY, results),
        ]
    )


def page(
    results: Results, costs: Mapping[str, Any], found: Mapping[str, TaskFindings], long: Longer
) -> str:
    """Return the page of tables in Markdown."""
    return "\n".join(
        [
            "# How well it learns: all tables\n",
            "[How well it learns](../../docs/evidence.md) has what follows from them.\n",
            _how(results, costs, found),
            _every_task(found),
            _rates(long),
            _matrices(results),
            _reported_table(long),
            section(STUDY, results),
        ]
    )


# --- the verdict ---------------------------------------------------------------------------------


def verdict(found: Mapping[str, TaskFindings], long: Longer) -> str:
    """Return the box on top of the page, in Markdown."""
    seeds = "" if all(long.has_all(name, MILD[name]) for name in ("bone", OTHER)) else FIRST
    near, far = lowest_losses(long)
    lines = [
        _line("Quality", found, "test loss", "loss", ("better", "worse")) + _in_favour(found),
        _line(
            "What the base could do, after training", found, KEPT, "forgetting", ("lower", "higher")
        ),
        f"**Forgetting, the rise of that loss: at one rate, MiSS forgets more.** It forgets "
        f"{_at_one_rate(long)} times as much as LoRA in the longer training, and "
        f"{REPORTED_FORGETTING:.1f} times [in PEFT's comparison](#what-others-report): one task "
        "each.",
        f"**At equal forgetting, {_all(near, far)} learn about as much** (forgetting up to "
        f"{LIMITS[-1]:g}): their test losses differ by at most {apart(near):.3f}. Those of the "
        f"seeds of one method differ by up to {spread(long):.3f}.",
        "**If you choose MiSS for its memory, take [0.1 to 0.3 of LoRA's (alpha = rank) "
        f"rate](choosing.md#learning-rate): {MILD['bone']:g} for the language model.** In the "
        f"longer training{seeds}, it then learns and forgets about as much as a LoRA at "
        f"{MILD[OTHER]:g}.",
    ]
    listed = "\n".join(f"- {line}" for line in lines)
    most = max(TASKS[task].steps for task in found)
    return box(
        "Verdict, compared with LoRA at equal parameters",
        f"""{listed}

Each figure is divided by LoRA's; lower is better. It is the geometric mean over
{count_text(len(found), "task")}, with its 95% interval in brackets. A difference is clear if 1 is
outside the interval; in a single task, if a paired test over the seeds says so.
The models have at most 135M parameters, and the training at most {most} steps. Each method has
its own best rate.
""",
    )


def _line(
    name: str, found: Mapping[str, TaskFindings], what: str, key: str | None, sides: tuple[str, str]
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


def _in_favour(found: Mapping[str, TaskFindings]) -> str:
    """Say how wide the interval of MiSS is, and in how many tasks each method is best or tied."""
    ratio = Overall.of(list(ratios(found, "bone", "test loss").values()))
    close = {name: len(best_or_tied(name, found)) for name in ("bone", OTHER, "rslora")}
    others = _joined([f"{METHODS[name].title} in {close[name]}" for name in (OTHER, "rslora")])
    favoured = ratio.clear and ratio.value < 1
    told = "" if favoured else "For quality alone, nothing here favours MiSS. "
    return (
        f" {told}MiSS is best, or tied with the best, in {close['bone']} of "
        f"{count_text(len(found), 'task')}, {others}. Its interval is about "
        f"±{(ratio.high - ratio.low) / 2:.0%}, so a smaller difference would not show."
    )


def best_or_tied(name: str, found: Mapping[str, TaskFindings]) -> list[str]:
    """Return the tasks in which a method is within noise of the best adapter."""
    return [
        task
        for task, one in found.items()
        if name in one.ranked and not one.apart(name, one.ranked[0])
    ]


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
        if not parts:
            parts = ["in none"]
        told.append(f"{METHODS[name].title} {' and '.join(parts)}")
    return f"Clear in single tasks: {', '.join(told)}."


def _joined(words: Sequence[str]) -> str:
    *others, last = words
    if not others:
        return last
    return f"{', '.join(others)} and {last}"


# --- every task ----------------------------------------------------------------------------------


def _every_task(found: Mapping[str, TaskFindings]) -> str:
    names = [name for name in METHODS if any(name in one.findings for one in found.values())]
    rows = []
    for name in names:
        of_method = [one.findings.get(name) for one in found.values()]
        rates = [one.rate for one in of_method if one is not None]
        close = len(best_or_tied(name, found))
        steps = list(ratios(found, name, "time of a step").values())
        lowest, highest = min(rates), max(rates)
        spanned = f"{lowest:g}" if lowest == highest else f"{lowest:g} to {highest:g}"
        losses = [NOTHING if one is None else f"{one.mean('loss'):.3f}" for one in of_method]
        tied = NOTHING if name == FULL else f"{close} of {len(rates)}"
        step = f"{statistics.geometric_mean(steps):.2f}" if steps else NOTHING
        rows.append([METHODS[name].title, spanned, *losses, tied, step])
    header = ["method", "best rates", *(TASKS[task].name for task in found), "best or tied", "step"]
    gaps = [one.findings["bone"].rate / one.findings[OTHER].rate for one in found.values()]
    times = [gap / _factor(task) for task, gap in zip(found, gaps, strict=True)]
    listed = "\n".join(f"- *{TASKS[task].name}*: {TASKS[task].about}" for task in found)
    return f"""## Test loss of every method and task

*Best rates* differ by task; *tied* means within noise of the best adapter. *Step* is the time of a
step, divided by LoRA's. The best rate of MiSS was {min(gaps):.1g} to
{max(gaps):.1g} times LoRA's, so do not reuse a rate from LoRA. If LoRA's rate is first multiplied
by [the factor](../../docs/choosing.md#learning-rate) of a square layer, the best rate of MiSS was
{min(times):.1f} to {max(times):.1f} times the product.

{table(header, rows)}
{folded("The tasks", listed)}"""


def _factor(task: str) -> float:
    rank = alpha = TASKS[task].r / 2  # of a LoRA with as many parameters in a square layer
    return float(alpha / (3 * rank * WIDTHS.get(task, 576)) ** 0.5)


# --- the longer training -------------------------------------------------------------------------

LIMITS = (0.1, 0.2, 0.3)
"""Of forgetting, at which the methods are compared."""
FIRST = " (first seed)"


def _longer(found: Longer) -> str:
    task = TASKS[LONG]
    base = found.own[OTHER].records[0]["forgetting"][0]
    near, far = lowest_losses(found)
    alike = _all(near, far)
    equal = zip(*near.values(), strict=True)
    lowest = _joined([f"{min(losses):.3f} to {max(losses):.3f}" for losses in equal])
    for name, losses in far.items():
        lowest += f"; of {METHODS[name].title}, {_joined([f'{loss:.3f}' for loss in losses])}"
    mild, own = MILD["bone"], found.own["bone"].rate
    low, high = (found.mean("bone", rate).forgetting for rate in (mild, own))
    least = found.mean("bone", mild).loss - min(one.mean("loss") for one in found.own.values())
    return f"""## Learning against forgetting

An adapter should learn the new task and keep what the base could do. The longest training shows
both: {task.steps} steps of {task.batch} examples, none twice, r = {task.r}. *Forgetting* is the
rise of the loss on text that the base itself wrote, from {base:.2f}. The [table of
rates](../{TABLES}#test-loss-and-forgetting-at-each-rate) has all figures.

![Test loss over forgetting, and over the learning rate]({PICTURES.format("longer")})

- **At equal forgetting, {alike} learn about as much in this task.** Each
  method may take any rate, and scale its adapter after training, until it forgets at most
  {_joined([f"{limit:g}" for limit in LIMITS])}. The lowest losses of the methods are then
  {lowest}.
- **At one rate, MiSS forgets more.** It forgets {_at_one_rate(found)} times as much as LoRA.
- **At a third of LoRA's rate, MiSS does about the same.** In the {len(thirds(found))} pairs
  of rates that are a factor of three apart, its loss is
  {_span(loss for loss, _ in thirds(found))}, and its forgetting
  {_span(f for _, f in thirds(found))}. With r = 16, in short trainings, a tenth was best.
- **A high rate costs more than it gives.** At {own:g}, MiSS forgets {high / low:.1f} times as much
  as at {mild:g}, and its test loss is no lower.
- **To forget less, you can scale the adapter after training.** That costs no more than a lower rate
  would have{FIRST}.
  {_scaled(found, "bone", 1e-4)}
  {_scaled(found, OTHER, mild)}
- **At the rates that the validation loss chooses, others learn more.** There, MiSS has a higher
  loss than {_lower(found)}, beyond noise. At {mild:g}, which the validation loss does not choose,
  the loss of MiSS is at most {least:.3f} higher than that of any other at its own rate.
"""


def _rates(found: Longer) -> str:
    rates = [
        [METHODS[name].title, *(_at(found, name, rate) for rate in found.rates)]
        for name in found.records
    ]
    return f"""## Test loss and forgetting at each rate

Of the longer training: test loss, then forgetting, at one rate for all. Bold is the rate that the
validation loss chooses, and that the verdict compares. A star: mean of {len(STUDY.seeds)} seeds;
others have the first.

{table(["method", *(f"{rate:g}" for rate in found.rates)], rates)}
{_sizes(found)}"""


def lowest_losses(found: Longer) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return those at equal forgetting: as near to MiSS's as seeds are, and farther."""
    lowest = {name: [found.at(name, limit)[0] for limit in LIMITS] for name in found.records}
    ours, of_seeds = lowest["bone"], spread(found)
    gaps = {
        name: max(abs(loss - our) for loss, our in zip(losses, ours, strict=True))
        for name, losses in lowest.items()
    }
    near = {name: lowest[name] for name, gap in gaps.items() if gap <= of_seeds}
    return near, {name: lowest[name] for name in lowest if name not in near}


def apart(near: Mapping[str, Sequence[float]]) -> float:
    """Return how far methods are apart at equal forgetting, at most."""
    return max(max(losses) - min(losses) for losses in zip(*near.values(), strict=True))


def _all(near: Mapping[str, list[float]], far: Mapping[str, list[float]]) -> str:
    more = {name: sum(losses) < sum(near["bone"]) for name, losses in far.items()}
    others = [f"{METHODS[n].title}, which learns {'more' if more[n] else 'less'}," for n in more]
    return f"all methods but {_joined(others)}" if others else "all methods"


def spread(found: Longer) -> float:
    """Return how far the seeds of a method are apart at equal forgetting, at most."""
    cases = [(name, limit) for name in found.records for limit in LIMITS]
    seeds = [found.within(name, found.at(name, limit)[1], limit) for name, limit in cases]
    return max(max(losses) - min(losses) for losses in seeds)


def thirds(found: Longer) -> list[tuple[float, float]]:
    """Return loss and forgetting of MiSS, minus LoRA's, at about a third of each rate of LoRA."""
    pairs = [
        list(zip(found.ends("bone", third), found.ends(OTHER, rate), strict=False))
        for third, rate in pairwise(found.rates)
        if rate / third < 4
    ]
    return [(_mean_gap(pair, "loss"), _mean_gap(pair, "forgetting")) for pair in pairs if pair]


def _mean_gap(seeds: Sequence[tuple[Point, Point]], what: str) -> float:
    """Return the mean difference over the seeds that both have."""
    return statistics.fmean(getattr(one, what) - getattr(other, what) for one, other in seeds)


def _span(values: Iterable[float]) -> str:
    """Return from where to where values go: 0.024 lower to 0.034 higher."""
    ordered = sorted(values)
    ends = (ordered[0], ordered[-1])
    return " to ".join(f"{abs(v):.3f} {'lower' if v < 0 else 'higher'}" for v in ends)


def _at(found: Longer, name: str, rate: float) -> str:
    text = _figures(found, name, rate)
    text = f"**{text}**" if name in found.own and rate == found.own[name].rate else text
    return f"{text} \\*" if found.has_all(name, rate) else text


def _figures(found: Longer, name: str, rate: float) -> str:
    if rate not in found.records.get(name, ()):
        return NOTHING
    mean = found.mean(name, rate)
    return f"{mean.loss:.3f} {mean.forgetting:+.2f}"


def _scaled(found: Longer, name: str, low: float) -> str:
    """Return the loss of a scaled training, and of one at a lower rate that forgets as much."""
    end = found.ends(name, low)[0]
    scaled = at_forgetting(points(found.records[name][MILD[name]][0]), end.forgetting)
    return (
        f"{METHODS[name].title}, trained at {low:g}, has {end.loss:.3f}; trained at "
        f"{MILD[name]:g} and scaled until it forgets as little, {scaled:.3f}."
    )


def _lower(found: Longer) -> str:
    """Say which methods have a clearly lower loss than MiSS, each at its own rate."""
    ours = found.own["bone"].values("loss")
    lower = {
        METHODS[name].title: statistics.fmean(ours) - one.mean("loss")
        for name, one in found.own.items()
        if one.mean("loss") < statistics.fmean(ours) and differ(one.values("loss"), ours)
    }
    return _joined([f"{title} (by {gap:.3f})" for title, gap in lower.items()])


def _sizes(found: Longer) -> str:
    both = sorted(set(found.sizes["bone"]) & set(found.sizes[OTHER]))
    losses = {
        name: ", ".join(f"{found.sizes[name][r]:.3f}" for r in both) for name in ("bone", OTHER)
    }
    return f"""With r = {", ".join(map(str, both))}, at the bold rates{FIRST}: MiSS has
{losses["bone"]}; LoRA, with as many parameters, has {losses[OTHER]}.
"""


# --- other fixed matrices ------------------------------------------------------------------------


def _matrices(results: Results) -> str:
    columns = matrices(results)
    rows = []
    for name in ("bone", *MATRICES):
        row = ["[I I ... I]" if name == "bone" else MATRICES[name][0]]
        for losses in columns.values():
            clear = name in losses and differ(losses[name], losses["bone"])
            mean = f"{statistics.fmean(losses[name]):.3f}" if name in losses else NOTHING
            row.append(f"{mean} \\*" if clear else mean)
        rows.append(row)
    header = ["A", *(f"{task} {rate:g}, {count_text(len(losses['bone']), 'seed')}"
                     for (task, rate), losses in columns.items())]  # fmt: skip
    return f"""## Other fixed matrices

MiSS is a LoRA whose A stays [I I ... I]. Other fixed A, with columns of about the same
length, at the best rate of MiSS, and for digits at a third of it; mean test loss:

{table(header, rows)}
A star: beyond noise. **[I I ... I] is the cheapest, but not the best in the two smaller models**:
random signs have a lower loss there. They cost little: a sign for each input, before the shards are
summed. For the language model they change nothing. `disha` has none.
"""


def matrices(results: Results) -> dict[tuple[str, float], dict[str, list[float]]]:
    """Return task and rate -> matrix -> the losses of the seeds, where there are others."""
    columns = {
        (task, rate): {
            name: losses
            for name in ("bone", *MATRICES)
            if (losses := losses_at(main_cell(task, name), rate, count, results))
        }
        for (task, rate), count in MATRIX_SEEDS.items()
    }
    return {column: losses for column, losses in columns.items() if len(losses) > 1}


# --- what others report --------------------------------------------------------------------------


class Reported(NamedTuple):
    """A row of PEFT's comparison; `correct` in percent begins with the newest run."""

    title: str
    method: str | None
    millions: float
    rate: float
    correct: tuple[float, ...]
    forgetting: float
    gibibytes: float
    seconds: int


REPORTED = (
    Reported("MiSS, r = 64", "bone", 7.3, 1e-4, (48.67, 50.72), 0.197, 18.9, 897),
    Reported("BAT, r = 64", "bat", 7.3, 1e-4, (50.42, 51.63), 0.194, 23.5, 1409),
    Reported("LoRA, r = 32", OTHER, 9.2, 1e-4, (47.84, 48.22, 49.05), 0.050, 20.8, 942),
    Reported("rsLoRA, r = 64", "rslora", 18.4, 1e-4, (51.33, 52.99, 53.22), 0.111, 21.0, 966),
    Reported("DoRA, r = 32", "dora", 9.3, 1e-4, (46.93,), 0.051, 22.8, 1191),
    Reported("SHiRA, r = 32", SHIRA, 9.2, 3e-4, (51.02,), 0.052, 20.2, 1003),
    Reported("GraLoRA, r = 32", None, 9.2, 2e-4, (49.51,), 0.057, 20.8, 1097),
    Reported("OFT, block 32", None, 8.2, 1e-4, (49.13,), 0.041, 20.8, 1192),
    Reported("HiRA, r = 32", None, 9.2, 4.5e-3, (51.33,), 0.130, 22.0, 1286),
    Reported("Lily on the MLP", None, 9.5, 1e-4, (52.62,), 0.216, 23.9, 1324),
    Reported("LoRA on the MLP, r = 10", None, 9.5, 1e-4, (49.43,), 0.032, 23.0, 1050),
    Reported("tile, 64 x 64", None, 0.2, 1e-4, (37.98,), 0.149, 18.8, 960),
    Reported("full fine-tuning", None, 3212.7, 1e-5, (47.16,), 0.030, 36.2, 2147),
)
"""Rows of PEFT's `method_comparison/MetaMathQA/results`, of July 2026; older runs are from 2025."""
REPORTED_FORGETTING = REPORTED[0].forgetting / REPORTED[2].forgetting


def _reported_table(found: Longer) -> str:
    varies = max(max(one.correct) - min(one.correct) for one in REPORTED)
    rows = [
        [
            one.title,
            f"{one.millions:,.1f}",
            f"{one.correct[0]:.1f}%",
            f"{one.forgetting:.3f}",
            f"{one.gibibytes:.1f}",
            f"{one.seconds:,}",
            _figures(found, one.method or "", one.rate),
        ]
        for one in REPORTED
    ]
    header = ["method", "million parameters", "correct", "forgetting", "GiB", "seconds", "here"]
    return f"""## Figures of PEFT's comparison

From [what others report](../../docs/evidence.md#what-others-report): Llama-3.2-3B, 5,000 steps of
4 examples, scored on GSM8K. Those that name no layers adapt the projections of q and v alone. The
rates are 0.0001, but for SHiRA (3e-4), GraLoRA (2e-4), HiRA (4.5e-3) and full fine-tuning (1e-5).
Repeated runs differ by up to {varies:.1f} points. *Here* are our test loss and
forgetting at the same rate.

{table(header, rows)}"""


def _at_one_rate(found: Longer) -> str:
    """Return how many times as much as LoRA MiSS forgets at one rate, by the table's figures."""
    rates = sorted(found.records["bone"].keys() & found.records[OTHER].keys())
    gaps = [found.mean("bone", r).forgetting / found.mean(OTHER, r).forgetting for r in rates]
    return f"{min(gaps):.1f} to {max(gaps):.1f}"


# --- how it was measured -------------------------------------------------------------------------


def _older(costs: Mapping[str, Any]) -> str:
    """Say that times and memory are of another version, if they are."""
    measured = costs["versions"]["disha"]
    if measured == __version__:
        return ""
    return (
        f" They were measured with disha {measured}, and all runs here are older than\n"
        f"  {__version__}. The formulas are the same since then; times may be other."
    )


def _how(results: Results, costs: Mapping[str, Any], found: Mapping[str, TaskFindings]) -> str:
    steps = ratios(found, "bone", "time of a step").values()
    hours = sum(record["seconds"] for record in results.values()) / 3600
    machine = costs["machine"]
    alike: dict[str, list[str]] = {}
    for name, method in METHODS.items():
        if name not in MATRICES and name in {run.cell.method for run in results}:
            alike.setdefault(method.about, []).append(method.title)
    settings = "; ".join(f"{_joined(titles)}: {about}" for about, titles in alike.items())
    return f"""## How it was measured

- **Equal parameters**: every adapter has as many as MiSS, within {LARGEST_DIFFERENCE:.0%}. Full
  fine-tuning of the same layers is shown for reference.
- **Equal training**: the same rows in the same order, AdamW without decay, clipping or dropout, a
  short warm-up and a cosine to zero. New heads train at {HEAD_RATE:g} with every method.
- **Own rates**: each method is tried at four rates or more, a factor of about three apart, and at
  one beyond if the best is at an edge. The loss on validation rows with one seed chooses the rate;
  then {len(STUDY.seeds)} seeds run. The tables have the loss on test rows. No best rate was chosen
  by test rows; only the advice to take {MILD["bone"]:g} for MiSS was written after we saw them.
- **Noise**: two methods differ if a paired t-test over seeds says so at 95%. With three seeds, only
  a large difference passes; among many pairs, some pass by chance.
- **What the base could do**: upright digits, or unrelated prose; in the longer training, text that
  the base wrote. For *packages*, the loss is 1 - the cosine to the base's embeddings of other text.
  The verdict compares this loss after training. *Forgetting* is its rise alone.
- **Time and memory of a step** are those of short rows, with an optimizer. A step of MiSS
  takes {min(steps):.2f} to {max(steps):.2f} of LoRA's. In [speed and
  memory](../../docs/performance.md) it is closer to 1: there a step has more tokens and no
  optimizer.{_older(costs)}
  {_line("Speed", found, "time of a step", None, ("faster", "slower"))}
  {_line("Memory", found, "memory of a step", None, ("less", "more"))} With [gradient
  checkpointing](../../docs/guides/memory.md), it is equal.
- **The base** of the language tasks, SmolLM2-135M, is the Instruct model of a Q4_1 file.
- **Settings**: {settings}.

`make evidence` measures, and `make evidence-report` writes this page from the results beside it:
{len(results)} runs, {hours:.1f} hours on one core that other work shared. Costs:
{machine["processor"]}, {count_text(machine["threads"], "thread")}; {versions_text(costs)}.
"""


if __name__ == "__main__":
    main()
