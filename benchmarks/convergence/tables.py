"""The tables of how well methods learn, in Markdown, from the kept runs. Pages have the prose."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from benchmarks.convergence.findings import (
    LIMITS,
    OTHER,
    RATIOS,
    Finding,
    Finished,
    Longer,
    Overall,
    differ,
    longer,
    losses_of_equal_seeds,
    main_findings,
    ratios,
    with_groups,
)
from benchmarks.convergence.methods import FULL, METHODS
from benchmarks.convergence.runs import Results
from benchmarks.markdown import NOTHING, table

COMPARED = ("bone", "bat", "rslora")
"""The methods that the verdict compares with LoRA."""


def tables(results: Results) -> dict[str, str]:
    """Return name -> table."""
    tasks = main_findings(results)
    groups = with_groups(results)
    return {
        "verdict": verdict(tasks),
        "losses": losses_of_tasks(tasks),
        "rates": losses_at_rates(longer(results)),
        "candidates": losses_of_groups(groups, results),
        "paired": paired(groups, results),
    }


def verdict(tasks: Finished) -> str:
    """Return the ratios to LoRA over all tasks, and in how many single tasks one is clear."""
    rows = []
    for what, key in RATIOS.items():
        overall = [Overall.of(list(ratios(tasks, name, what).values())) for name in COMPARED]
        rows.append([what, *(f"**{one}**" if one.clear else str(one) for one in overall)])
        counts = [clear_tasks(tasks, name, key) for name in COMPARED]
        rows.append(["lower, higher in single tasks", *(f"{low}, {high}" for low, high in counts)])
    return table(["divided by LoRA's", *(METHODS[name].title for name in COMPARED)], rows)


def clear_tasks(tasks: Finished, name: str, key: str) -> tuple[int, int]:
    """Return in how many tasks a method is below LoRA beyond noise, and in how many above."""
    counts = [0, 0]
    for found in tasks.values():
        if name in found:
            mine, others = (found[method].values(key) for method in (name, OTHER))
            if differ(mine, others):
                counts[sum(mine) > sum(others)] += 1
    return counts[0], counts[1]


def best_or_tied(name: str, tasks: Finished) -> list[str]:
    """Return the tasks in which a method is within noise of the best adapter."""
    tied = []
    for task, found in tasks.items():
        adapters = [one for one in found if one != FULL]
        best = min(adapters, key=lambda one: found[one].mean("loss"))
        if name in adapters and not differ(found[name].values("loss"), found[best].values("loss")):
            tied.append(task)
    return tied


def losses_of_tasks(tasks: Finished) -> str:
    """Return the test loss of every method and task, and how often each is tied with the best."""
    rows = []
    for name in _names(tasks):
        of_method = [found.get(name) for found in tasks.values()]
        rates = [one.rate for one in of_method if one is not None]
        lowest, highest = min(rates), max(rates)
        spanned = f"{lowest:g}" if lowest == highest else f"{lowest:g} to {highest:g}"
        losses = [NOTHING if one is None else f"{one.mean('loss'):.3f}" for one in of_method]
        tied = NOTHING if name == FULL else f"{len(best_or_tied(name, tasks))} of {len(rates)}"
        rows.append([METHODS[name].title, spanned, *losses, tied])
    return table(["method", "best rates", *tasks, "best or tied"], rows)


def _names(tasks: Finished) -> list[str]:
    """Return the methods that are finished in a task, in their order."""
    return [name for name in METHODS if any(name in found for found in tasks.values())]


def losses_at_rates(long: Longer) -> str:
    """Return the longer training: loss and forgetting at each rate, and the lowest loss in limits.

    The bold of a limit is the lowest of all methods, within all rates and scales.
    """
    lowest = {name: [long.at(name, limit)[0] for limit in LIMITS] for name in long.records}
    lowest_of_all = [min(losses) for losses in zip(*lowest.values(), strict=True)]
    rows = []
    for name in long.records:
        row = [METHODS[name].title]
        for rate in long.rates:
            text = NOTHING
            if rate in long.records[name]:
                mean = long.mean(name, rate)
                text = f"{mean.loss:.3f} {mean.forgetting:+.2f}"
            if name in long.own and rate == long.own[name].rate:
                text = f"**{text}**"
            row.append(f"{text} \\*" if long.has_all(name, rate) else text)
        for loss, best in zip(lowest[name], lowest_of_all, strict=True):
            row.append(f"**{loss:.3f}**" if loss == best else f"{loss:.3f}")
        rows.append(row)
    rates = [f"{rate:g}" for rate in long.rates]
    return table(["method", *rates, *(f"within {limit:g}" for limit in LIMITS)], rows)


# --- groups of shards ----------------------------------------------------------------------------


def losses_of_groups(finished: Finished, results: Results) -> str:
    """Return loss, forgetting and rate of groups, and of what they are compared with."""
    rows = []
    for name in _names(finished):
        cells = [_group_text(found, name, results) for found in finished.values()]
        rows.append([METHODS[name].title, *cells])
    return table(["method", *finished], rows)


def _group_text(found: Mapping[str, Finding], name: str, results: Results) -> str:
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
    for name in _names(finished):
        if name.startswith("groups"):
            for other in ("bone", OTHER):
                row = [f"{METHODS[name].title} - {METHODS[other].title}"]
                row += [_gap_text(found, name, other, results) for found in finished.values()]
                rows.append(row)
    return table(["", *finished], rows)


def _gap_text(found: Mapping[str, Finding], name: str, other: str, results: Results) -> str:
    if name not in found:
        return NOTHING
    mine, others = losses_of_equal_seeds(found[name], found[other], results)
    gap = statistics.fmean(mine) - statistics.fmean(others)
    return f"{gap:+.3f}{_gap_mark(mine, others)}"


def _gap_mark(mine: Sequence[float], others: Sequence[float]) -> str:
    """Return a star where the first are lower beyond noise, a dagger where they are higher."""
    if not differ(mine, others):
        return ""
    return " \\*" if statistics.fmean(mine) < statistics.fmean(others) else " †"
