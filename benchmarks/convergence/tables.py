"""The tables of how well methods learn, in Markdown, from the kept runs. Pages have the prose."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from benchmarks.convergence.findings import (
    LIMITS,
    OTHER,
    Finding,
    Longer,
    Overall,
    Point,
    TaskFindings,
    all_finished,
    differ,
    findings_of_tasks,
    longer,
    losses_at,
    losses_of_equal_seeds,
    ratios,
)
from benchmarks.convergence.methods import FULL, GRALORA, MATRICES, METHODS, OFT
from benchmarks.convergence.plan import (
    LONG_RATES,
    MATRIX_SEEDS,
    Results,
    main_cell,
)
from benchmarks.markdown import NOTHING, count_text, table

COMPARED = ("bone", "bat", "rslora")
"""The methods that the verdict compares with LoRA."""
PAIRED = ("groups2", "groups3", "groups4", "groups_all", OFT, GRALORA)
"""The methods that are compared with MiSS and LoRA seed by seed."""
RATIOS = {
    "test loss": "loss",
    "loss on what the base could do": "forgetting",
    "time of a step": None,
    "memory of a step": None,
}
"""What the verdict compares -> the figure that a paired test compares in single tasks."""

Tasks = Mapping[str, TaskFindings]


def tables(results: Results, costs: Mapping[str, object]) -> dict[str, str]:
    """Return name -> table."""
    tasks = findings_of_tasks(results, costs)
    long = longer(results)
    finished = all_finished(results)
    return {
        "verdict": verdict(tasks),
        "losses": losses_of_tasks(tasks),
        "rates": losses_at_rates(long),
        "sizes": losses_of_sizes(long),
        "matrices": fixed_matrices(results),
        "candidates": candidates(finished, results),
        "paired": paired(finished, results),
        "forgetting": within_limits(longer(results, candidates=True)),
    }


def verdict(tasks: Tasks) -> str:
    """Return the ratios to LoRA over all tasks, and in how many single tasks one is clear."""
    rows = []
    for what, key in RATIOS.items():
        overall = [Overall.of(list(ratios(tasks, name, what).values())) for name in COMPARED]
        rows.append([what, *(f"**{one}**" if one.clear else str(one) for one in overall)])
        if key is not None:
            counts = [clear_tasks(tasks, name, key) for name in COMPARED]
            rows.append(
                ["lower, higher in single tasks", *(f"{low}, {high}" for low, high in counts)]
            )
    return table(["divided by LoRA's", *(METHODS[name].title for name in COMPARED)], rows)


def clear_tasks(tasks: Tasks, name: str, key: str) -> tuple[int, int]:
    """Return in how many tasks a method is below LoRA beyond noise, and in how many above."""
    counts = [0, 0]
    for one in tasks.values():
        if name in one.findings:
            mine, others = (one.findings[method].values(key) for method in (name, OTHER))
            if differ(mine, others):
                counts[sum(mine) > sum(others)] += 1
    return counts[0], counts[1]


def best_or_tied(name: str, tasks: Tasks) -> list[str]:
    """Return the tasks in which a method is within noise of the best adapter."""
    return [
        task
        for task, one in tasks.items()
        if name in one.ranked and not one.apart(name, one.ranked[0])
    ]


def losses_of_tasks(tasks: Tasks) -> str:
    """Return the test loss of every method and task, and how often each is tied with the best."""
    names = [name for name in METHODS if any(name in one.findings for one in tasks.values())]
    rows = []
    for name in names:
        of_method = [one.findings.get(name) for one in tasks.values()]
        rates = [one.rate for one in of_method if one is not None]
        steps = list(ratios(tasks, name, "time of a step").values())
        lowest, highest = min(rates), max(rates)
        spanned = f"{lowest:g}" if lowest == highest else f"{lowest:g} to {highest:g}"
        losses = [NOTHING if one is None else f"{one.mean('loss'):.3f}" for one in of_method]
        tied = NOTHING if name == FULL else f"{len(best_or_tied(name, tasks))} of {len(rates)}"
        step = f"{statistics.geometric_mean(steps):.2f}" if steps else NOTHING
        rows.append([METHODS[name].title, spanned, *losses, tied, step])
    return table(["method", "best rates", *tasks, "best or tied", "step"], rows)


def losses_at_rates(long: Longer) -> str:
    """Return loss and forgetting of the longer training, at one rate for all."""
    rows = []
    for name in long.records:
        row = [METHODS[name].title]
        for rate in long.rates:
            text = NOTHING
            if rate in long.records[name]:
                text = _point_text(long.mean(name, rate))
            if name in long.own and rate == long.own[name].rate:
                text = f"**{text}**"
            row.append(f"{text} \\*" if long.has_all(name, rate) else text)
        rows.append(row)
    return table(["method", *(f"{rate:g}" for rate in long.rates)], rows)


def _point_text(point: Point) -> str:
    return f"{point.loss:.3f} {point.forgetting:+.2f}"


def losses_of_sizes(long: Longer) -> str:
    """Return the test loss of MiSS and LoRA for each r."""
    sizes = sorted(long.sizes["bone"].keys() & long.sizes[OTHER].keys())
    rows = [
        [METHODS[name].title, *(f"{long.sizes[name][r]:.3f}" for r in sizes)]
        for name in ("bone", OTHER)
    ]
    return table(["method", *(f"r = {r}" for r in sizes)], rows)


def fixed_matrices(results: Results) -> str:
    """Return the test loss with other fixed A."""
    columns = matrices(results)
    rows = []
    for name in ("bone", *MATRICES):
        row = ["[I I ... I]" if name == "bone" else MATRICES[name][0]]
        for losses in columns.values():
            clear = name in losses and differ(losses[name], losses["bone"])
            mean = f"{statistics.fmean(losses[name]):.3f}" if name in losses else NOTHING
            row.append(f"{mean} \\*" if clear else mean)
        rows.append(row)
    header = [
        f"{task} {rate:g}, {count_text(len(losses['bone']), 'seed')}"
        for (task, rate), losses in columns.items()
    ]
    return table(["A", *header], rows)


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


# --- what was tried beside the study's methods ---------------------------------------------------

Finished = Mapping[str, Mapping[str, Finding]]


def candidates(finished: Finished, results: Results) -> str:
    """Return loss, forgetting and rate of groups and of other candidates, and of references."""
    rows = []
    for name in METHODS:
        if any(name in found for found in finished.values()):
            cells = [_candidate_text(found, name, results) for found in finished.values()]
            rows.append([METHODS[name].title, *cells])
    return table(["method", *finished], rows)


def _candidate_text(found: Mapping[str, Finding], name: str, results: Results) -> str:
    if name not in found:
        return NOTHING
    mine = found[name]
    mark = ""
    if name != "bone":
        mark = _gap_mark(*losses_of_equal_seeds(mine, found["bone"], results))
    base = statistics.fmean([record["forgetting"][0] for record in mine.records])
    rise = mine.mean("forgetting") - base
    return f"{mine.mean('loss'):.3f}{mark}, {rise:+.2f}, {mine.rate:g}"


def paired(finished: Finished, results: Results) -> str:
    """Return the mean gap of test losses to MiSS and to LoRA, over the seeds that both have."""
    rows = []
    for name in PAIRED:
        for other in ("bone", OTHER):
            row = [f"{METHODS[name].title} - {METHODS[other].title}"]
            for found in finished.values():
                row.append(_gap_text(found, name, other, results))
            rows.append(row)
    return table(["", *finished], rows)


def _gap_text(found: Mapping[str, Finding], name: str, other: str, results: Results) -> str:
    if name not in found or other not in found:
        return NOTHING
    mine, others = losses_of_equal_seeds(found[name], found[other], results)
    gap = statistics.fmean(mine) - statistics.fmean(others)
    return f"{gap:+.3f}{_gap_mark(mine, others)}"


def _gap_mark(mine: Sequence[float], others: Sequence[float]) -> str:
    """Return a star where the first are lower beyond noise, a dagger where they are higher."""
    if not differ(mine, others):
        return ""
    return " \\*" if statistics.fmean(mine) < statistics.fmean(others) else " †"


def within_limits(long: Longer) -> str:
    """Return the longer training: each method and rate, and the lowest loss within limits."""
    lowest = {name: [long.at(name, limit)[0] for limit in LIMITS] for name in long.records}
    lowest_of_all = [min(losses) for losses in zip(*lowest.values(), strict=True)]
    rows = []
    for name in long.records:
        row = [METHODS[name].title]
        for rate in LONG_RATES:
            ends = long.ends(name, rate)
            row.append(f"{_mean_text(ends)} ({len(ends)})" if ends else NOTHING)
        for loss, best in zip(lowest[name], lowest_of_all, strict=True):
            row.append(f"**{loss:.3f}**" if loss == best else f"{loss:.3f}")
        rows.append(row)
    rates = [f"{rate:g}" for rate in LONG_RATES]
    return table(["method", *rates, *(f"within {limit:g}" for limit in LIMITS)], rows)


def _mean_text(ends: Sequence[Point]) -> str:
    return _point_text(Point(*map(statistics.fmean, zip(*ends, strict=True))))
