"""The tasks of the study, by name."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.convergence.tasks.arithmetic import Arithmetic
from benchmarks.convergence.tasks.digits import Digits, resized_digits
from benchmarks.convergence.tasks.docstrings import Docstrings
from benchmarks.convergence.tasks.documentation import Documentation
from benchmarks.convergence.tasks.packages import Packages
from benchmarks.convergence.tasks.task import Task

TASKS: dict[str, Task] = {
    task.name: task for task in (Digits(), Packages(), Arithmetic(), Docstrings(), Documentation())
}

EVERY_TASK: Mapping[str, Task] = TASKS | {
    task.name: task
    for task in (
        *(resized_digits(f"digits, width {width}", width=width) for width in (32, 128)),
        *(resized_digits(f"digits, depth {depth}", depth=depth) for depth in (2, 8)),
        *(resized_digits(f"digits, {steps} steps", steps=steps) for steps in (50, 450)),
    )
}
"""Also the vision task with other widths, depths and lengths, to see how the best rates move."""
