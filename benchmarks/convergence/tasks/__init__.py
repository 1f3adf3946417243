"""The tasks of the study, by name."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.convergence.tasks.arithmetic import Arithmetic
from benchmarks.convergence.tasks.digits import Digits
from benchmarks.convergence.tasks.docstrings import Docstrings
from benchmarks.convergence.tasks.documentation import Documentation
from benchmarks.convergence.tasks.packages import Packages
from benchmarks.convergence.tasks.task import Task

TASKS: Mapping[str, Task] = {
    task.name: task for task in (Digits(), Packages(), Arithmetic(), Docstrings(), Documentation())
}
