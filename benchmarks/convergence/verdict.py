"""The verdict on top of the page: quality, speed, memory and forgetting, each compared with LoRA.

Each is a ratio to LoRA, averaged over the tasks by the geometric mean. The interval is Student's,
of the logarithms over the tasks.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.convergence.findings import STUDENT_95, Finding, TaskFindings, differ
from benchmarks.convergence.methods import METHODS
from benchmarks.markdown import box, count_text

__all__ = ["COMPARED", "RATIOS", "Overall", "ratios", "verdict"]

COMPARED = ("bone", "bat")
OTHER = "lora"
Tasks = Mapping[str, TaskFindings]


@dataclass(frozen=True)
class Overall:
    """A ratio over all tasks.

    Args:
        value: the geometric mean.
        low: lower end of the 95% interval; of one task, 0.
        high: its upper end; of one task, infinite.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Overall:
        """Return that of the ratios of at least one task."""
        logs = [math.log(value) for value in values]
        mean = statistics.fmean(logs)
        if len(logs) < 2:
            return cls(math.exp(mean), 0.0, math.inf)
        half = STUDENT_95[len(logs) - 1] * statistics.stdev(logs) / math.sqrt(len(logs))
        return cls(*(math.exp(mean + shift) for shift in (0.0, -half, half)))

    @property
    def clear(self) -> bool:
        """Whether 1 is outside the interval, which shows a difference."""
        return not self.low <= 1.0 <= self.high

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{self.value:.2f} (one task)"
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def _loss(found: TaskFindings, method: str) -> float:
    return found.findings[method].mean("loss").value / found.findings[OTHER].mean("loss").value


def _forgotten(found: TaskFindings, method: str) -> float:
    mine, others = (found.findings[name].forgetting[1].value for name in (method, OTHER))
    return mine / others


def _seconds(found: TaskFindings, method: str) -> float:
    return found.costs[method].ratio


def _bytes(found: TaskFindings, method: str) -> float:
    return found.costs[method].peak_bytes / found.costs[OTHER].peak_bytes


RATIOS: Mapping[str, Callable[[TaskFindings, str], float]] = {
    "test loss": _loss,
    "time of a step": _seconds,
    "memory of a step": _bytes,
    "forgetting": _forgotten,
}
"""What is compared -> the ratio of a method to LoRA in a task. Lower is better in all."""
KEYS = {"test loss": "loss", "forgetting": "forgetting"}
"""What was measured of each seed's model -> its key in the results."""
IN_ONE_TASK = {"test loss": ("better", "worse"), "forgetting": ("less forgetful", "more forgetful")}
"""The same -> what a method is whose figure is lower than LoRA's, and higher."""
COSTS = ("time of a step", "memory of a step")


def ratios(shown: Tasks, method: str, what: str) -> dict[str, float]:
    """Return task -> the ratio of a method to LoRA, for each task that has one.

    Args:
        shown: task -> findings, with LoRA's among them.
        method: its name.
        what: one of `RATIOS`.
    """
    has = "costs" if what in COSTS else "findings"
    there = {task: one for task, one in shown.items() if {method, OTHER} <= set(getattr(one, has))}
    return {task: RATIOS[what](one, method) for task, one in there.items()}


def verdict(shown: Tasks) -> str:
    """Return the box on top of the page, in Markdown; empty without a finished task.

    Args:
        shown: task -> findings, with LoRA's among them.
    """
    methods = [name for name in COMPARED if ratios(shown, name, "test loss")]
    if not methods:
        return ""
    lines = [
        _line("Quality", shown, methods, "test loss", ("better", "worse")),
        _line("Speed", shown, methods, "time of a step", ("faster", "slower")),
        _line("Memory", shown, methods, "memory of a step", ("less", "more")),
        _line("Forgetting", shown, methods, "forgetting", ("less", "more")),
    ]
    listed = "\n".join(f"- {line}" for line in lines)
    return box(
        f"Verdict: {_titles(methods)} compared with LoRA, at equal parameters",
        f"""{listed}

Each figure is the geometric mean over {count_text(len(shown), "task")}, with its 95% interval in
brackets. A difference is clear if 1 is outside the interval. In a single task, it is clear if a
paired test over the seeds says so. Quality is the loss on test rows. Forgetting is measured after
training, on something that the base could do. Lower is better everywhere. The models are small, the
training is short (at most {_most_steps(shown)} steps), and each method has its own best learning
rate. Nothing here was measured on large models.
""",
    )


def _most_steps(shown: Tasks) -> int:
    return max(one.findings[OTHER].steps[-1] for one in shown.values())


def _line(
    name: str, shown: Tasks, methods: Sequence[str], what: str, sides: tuple[str, str]
) -> str:
    """Say who is lower or higher than LoRA, with the figures; or that it was not measured."""
    measured = {one: list(ratios(shown, one, what).values()) for one in methods}
    overall = {one: Overall.of(values) for one, values in measured.items() if values}
    if not overall:
        return f"**{name}: not measured.**"
    words = {
        one: "no clear difference" if not ratio.clear else f"clearly {sides[ratio.value > 1]}"
        for one, ratio in overall.items()
    }
    found = "; ".join(
        f"{_titles([one for one in words if words[one] == word])}: {word}"
        for word in dict.fromkeys(words.values())
    )
    figures = ", ".join(f"{METHODS[one].title} {ratio}" for one, ratio in overall.items())
    said = f"**{name}. {found}.** {what.capitalize()}, divided by LoRA's: {figures}."
    if what not in COSTS:
        return f"{said} {_by_task(shown, methods, what)}"
    tasks = max(map(len, measured.values()))
    return said if tasks == len(shown) else f"{said} Measured in {count_text(tasks, 'task')}."


def _by_task(shown: Tasks, methods: Sequence[str], what: str) -> str:
    """Say in how many single tasks the difference is clear."""
    said = []
    for name in methods:
        lower, higher, tasks = _counts(shown, name, KEYS[what])
        less, more = IN_ONE_TASK[what]
        counts = f"is clearly {less} in {lower or 'none'} and clearly {more} in {higher or 'none'}"
        told = counts if lower + higher else "differs clearly in none"
        said.append(f"{METHODS[name].title} {told}")
    return f"Of {count_text(tasks, 'task')}, {'; '.join(said)}."


def _titles(methods: Sequence[str]) -> str:
    return " and ".join(METHODS[name].title for name in methods)


def _counts(shown: Tasks, method: str, key: str) -> tuple[int, int, int]:
    """Return in how many tasks a method is clearly lower than LoRA, higher, and the tasks."""
    pairs = [
        [_by_seed(one.findings[name], key) for name in (method, OTHER)]
        for one in shown.values()
        if method in one.findings
    ]
    clear = [sum(mine) < sum(others) for mine, others in pairs if differ(mine, others)]
    return sum(clear), len(clear) - sum(clear), len(pairs)


def _by_seed(found: Finding, key: str) -> list[float]:
    """Return a figure of each seed; of forgetting, that after training."""
    values = [record[key] for record in found.records]
    return [value[1] if key == "forgetting" else value for value in values]
