"""The section of the report on groups: what the candidates do beside MiSS and LoRA."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

from benchmarks.convergence.findings import Finding, Longer, Point, differ, finding, trained
from benchmarks.convergence.methods import METHODS, SHIRA
from benchmarks.convergence.plan import (
    CANDIDATES,
    FIRST_RATES,
    LONG,
    LONG_RATES,
    Results,
    Study,
    main_cell,
)
from benchmarks.convergence.runs import Run
from benchmarks.convergence.tasks import TASKS
from benchmarks.markdown import NOTHING, count_text, table

REFERENCES = ("bone", "bat", "lora", "rslora", SHIRA)
"""The methods that the candidates are compared with."""
RULES: Mapping[str, tuple[str, ...]] = {
    "a few groups (2 to 4)": ("groups2", "groups3", "groups4"),
    "n groups": ("groups_all",),
}
"""Rule for the number of groups -> its candidates. A task counts for a rule by its best candidate
on the validation rows, so that the test rows choose nothing."""
LIMITS = (0.1, 0.2, 0.3)
LEAST_TASKS = 3
"""Groups must be better than MiSS in at least so many of the five tasks."""

TaskFindings = Mapping[str, Finding]
Record = Mapping[str, Any]


class Outcome(NamedTuple):
    """How the best candidate of a rule does in one task, compared with MiSS over the seeds."""

    method: str
    gap: float
    """Its mean test loss, minus that of MiSS."""
    clear: bool
    """Whether a paired t-test over the seeds tells the two apart."""
    rate: float
    rate_of_lora: float


def findings_of(study: Study, results: Results) -> dict[str, TaskFindings]:
    """Return task -> method -> finding, of the references and of finished candidates."""
    all_found: dict[str, TaskFindings] = {}
    for task, candidates in CANDIDATES.items():
        of_task = {}
        for name in dict.fromkeys((*REFERENCES, *candidates)):
            cell = main_cell(task, name)
            done = finding(cell, study, results) if cell in study.cells else None
            if done is not None:
                of_task[name] = done
        all_found[task] = of_task
    return all_found


def losses_of_equal_seeds(
    mine: Finding, ours: Finding, results: Results
) -> tuple[list[float], list[float]]:
    """Return the test losses of two methods at their best rates, for all seeds that both have."""
    pairs = []
    for seed in itertools.count():
        runs = [Run(one.cell, one.rate, seed) for one in (mine, ours)]
        if any(run not in results for run in runs):
            break
        pairs.append([results[run]["loss"] for run in runs])
    return [first for first, _ in pairs], [second for _, second in pairs]


def outcomes(tasks: Mapping[str, TaskFindings], rule: str, results: Results) -> dict[str, Outcome]:
    """Return task -> outcome of a rule, for the tasks where one of its candidates is finished."""
    of_rule: dict[str, Outcome] = {}
    for task, found in tasks.items():
        finished = [name for name in RULES[rule] if name in found]
        if not finished or not {"bone", "lora"} <= found.keys():
            continue
        best = min(finished, key=lambda name: found[name].records[0]["validation"][-1])
        mine, ours = losses_of_equal_seeds(found[best], found["bone"], results)
        gap = statistics.fmean(mine) - statistics.fmean(ours)
        rate_of_lora = found["lora"].rate
        of_rule[task] = Outcome(best, gap, differ(mine, ours), found[best].rate, rate_of_lora)
    return of_rule


def verdict_of(rule: str, of_rule: Mapping[str, Outcome]) -> str:
    """Return what the runs say of a rule, by the terms that were fixed before them."""
    lower, higher = _clear_tasks(of_rule)
    # In the longer training, candidates have one rate, which says nothing of the best one.
    searched = {task: one for task, one in of_rule.items() if task != LONG}
    moved = [task for task, one in searched.items() if one.rate != one.rate_of_lora]
    name = rule[0].upper() + rule[1:]
    parts = [
        f"- **{name}**: a lower test loss than MiSS, beyond noise, in {len(lower)} of "
        f"{count_text(len(of_rule), 'task')}{_in_brackets(lower)}, a higher one in "
        f"{len(higher)}{_in_brackets(higher)}."
    ]
    gaps = ", ".join(f"{task} {one.gap:+.3f}" for task, one in of_rule.items())
    parts.append(f"Differences of the means: {gaps}.")
    if moved:
        parts.append(f"The best rate is not LoRA's in {', '.join(moved)}.")
    else:
        parts.append("The best rate is LoRA's in each task where several were tried.")
    return "\n  ".join(parts)


def decision_of(all_outcomes: Mapping[str, Mapping[str, Outcome]]) -> str:
    """Return which rules the library has, by the terms that were fixed before the runs."""
    accepted = [rule for rule, of_rule in all_outcomes.items() if _is_accepted(of_rule)]
    if not accepted:
        return "By these terms, no groups are added to the library."
    return (
        f"By these terms, {' and '.join(accepted)} are in the library, as `groups`. The default "
        "stays one group."
    )


def _clear_tasks(of_rule: Mapping[str, Outcome]) -> tuple[list[str], list[str]]:
    """Return the tasks where a rule is better than MiSS beyond noise, and where it is worse."""
    lower = [task for task, one in of_rule.items() if one.clear and one.gap < 0]
    higher = [task for task, one in of_rule.items() if one.clear and one.gap > 0]
    return lower, higher


def _is_accepted(of_rule: Mapping[str, Outcome]) -> bool:
    lower, higher = _clear_tasks(of_rule)
    return len(lower) >= LEAST_TASKS and not higher


def _in_brackets(tasks: list[str]) -> str:
    if not tasks:
        return ""
    return f" ({', '.join(tasks)})"


def beside_lora(tasks: Mapping[str, TaskFindings], name: str) -> str:
    """Return in which tasks a candidate has a lower mean loss than LoRA, and where a higher."""
    both = {task: found for task, found in tasks.items() if {name, "lora"} <= found.keys()}
    lower = [task for task, found in both.items()
             if found[name].mean("loss") < found["lora"].mean("loss")]  # fmt: skip
    higher = [task for task in both if task not in lower]
    return (
        f"Beside LoRA, the mean loss of {METHODS[name].title} is lower in {len(lower)} of "
        f"{count_text(len(both), 'task')}{_in_brackets(lower)} and higher in "
        f"{len(higher)}{_in_brackets(higher)}."
    )


def decided(study: Study, results: Results) -> str:
    """Return what the runs say of groups, in Markdown, for docs/evidence.md."""
    tasks = findings_of(study, results)
    all_outcomes = {rule: outcomes(tasks, rule, results) for rule in RULES}
    verdicts = "\n".join(verdict_of(rule, of_rule) for rule, of_rule in all_outcomes.items())
    return f"""## Groups of shards

With g [groups of shards](mathematics.md#groups-of-shards), an output of MiSS sees only the shards
of its own group. The rule of the decision was fixed before the first run. Groups are not added to
the library if no choice of g has a lower test loss than MiSS, beyond noise, in three of five tasks,
or if that choice has a higher one in any.

{verdicts}

{decision_of(all_outcomes)} {beside_lora(tasks, "groups_all")}

![Test loss over forgetting, of groups of shards and of other methods](assets/evidence-groups.svg)
"""


def section(study: Study, results: Results) -> str:
    """Return the tables of groups, in Markdown."""
    tasks = findings_of(study, results)
    finished = {task: found for task, found in tasks.items() if _has_candidate(task, found)}
    names = [name for name in METHODS if any(name in found for found in finished.values())]
    rows = [[METHODS[name].title, *(_cell(found, name, results) for found in finished.values())]
            for name in names]  # fmt: skip
    missing = []
    for task, candidates in CANDIDATES.items():
        titles = [METHODS[name].title for name in candidates if name not in tasks[task]]
        if titles:
            missing.append(f"- *{task}*: {'; '.join(titles)}")
    unfinished = ""
    if missing:
        lines = "\n".join(missing)
        unfinished = f"""
Not run to the end, so that `make evidence` would continue with it:

{lines}
"""
    return f"""## Groups of shards

With g groups, output o sees only the shards b with b mod g = o mod g (*contiguous*: the outputs of
a group are neighbours). The block, and so the number of parameters, is the same for any g; the rank
of the update rises from r up to g r. With n groups, each shard is a group of its own. *Signs*
multiply each input by +1 or -1 before the shards are summed; fixed ones are the Golay-Rudin-Shapiro
sequence.

{table(["method", *finished], rows)}
Mean test loss of three seeds at the best rate of each, forgetting (its rise), and the rate. A star:
lower than MiSS beyond noise; a dagger: higher. Where three seeds left it open whether groups differ
from MiSS, both have eight, and the marks and verdicts are of all of them. In *{LONG}*, candidates
ran at one rate, {FIRST_RATES[LONG][0]:g}, which was chosen before.
{unfinished}
{_longer(study, results)}"""


def _has_candidate(task: str, found: TaskFindings) -> bool:
    return any(name in found for name in CANDIDATES[task])


def _cell(found: TaskFindings, name: str, results: Results) -> str:
    if name not in found:
        return NOTHING
    mine = found[name]
    losses, of_miss = losses_of_equal_seeds(mine, found["bone"], results)
    mark = ""
    if name != "bone" and differ(losses, of_miss):
        mark = " \\*" if statistics.fmean(losses) < statistics.fmean(of_miss) else " †"
    base = statistics.fmean([record["forgetting"][0] for record in mine.records])
    return f"{mine.mean('loss'):.3f}{mark}, {mine.mean('forgetting') - base:+.2f}, {mine.rate:g}"


def beside_groups(study: Study, results: Results) -> Longer:
    """Return what candidates, and the methods beside them, did in the longer training."""
    names = (*REFERENCES, *CANDIDATES[LONG])
    return Longer(records=trained(names, study, results), own={}, sizes={})


def _longer(study: Study, results: Results) -> str:
    """Return the longer training: each candidate and rate, and the lowest loss within limits."""
    task = TASKS[LONG]
    found = beside_groups(study, results)
    lowest = {name: [found.at(name, limit)[0] for limit in LIMITS] for name in found.records}
    lowest_of_all = [min(losses) for losses in zip(*lowest.values(), strict=True)]
    rows = []
    for name in found.records:
        row = [METHODS[name].title]
        for rate in LONG_RATES:
            ends = found.ends(name, rate)
            row.append(_mean_of(ends) if ends else NOTHING)
        for loss, best in zip(lowest[name], lowest_of_all, strict=True):
            row.append(f"**{loss:.3f}**" if loss == best else f"{loss:.3f}")
        rows.append(row)
    header = [
        "method",
        *(f"{rate:g}" for rate in LONG_RATES),
        *(f"within {limit:g}" for limit in LIMITS),
    ]
    return f"""In the longer training ({task.steps} steps, r = {task.r}), at one rate for all: test
loss, forgetting, and how many seeds have run. *Within* a limit of forgetting stands the lowest loss
over all rates and all scales of the trained update; bold is the lowest of all methods.

{table(header, rows)}"""


def _mean_of(ends: list[Point]) -> str:
    loss = statistics.fmean(end.loss for end in ends)
    forgetting = statistics.fmean(end.forgetting for end in ends)
    return f"{loss:.3f} {forgetting:+.2f} ({len(ends)})"
