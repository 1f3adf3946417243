"""Showing how training goes: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from disha.finetune.training.loop import Step

__all__ = ["ShowStep", "showing_progress"]


class ShowStep(Protocol):
    """Shows one optimiser step."""

    def __call__(self, step: Step) -> None:
        """Show `step`."""


@contextmanager
def showing_progress(
    steps: int, every: int, *, first: int = 0, checked: str = "held-out", shown: bool = True
) -> Iterator[ShowStep]:
    """Yield what shows each step: loss, tokens per second and time left.

    Args:
        steps: how many steps there will be.
        every: renew the numbers every so many steps.
        first: how many of the steps were done before.
        checked: what rows the loss is measured on.
        shown: whether to show anything; of several processes one does.
    """
    if not shown:
        yield lambda step: None
        return
    if not sys.stdout.isatty():
        yield lambda step: _print_line(step, steps, every, checked)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    numbers = TextColumn("{task.fields[numbers]}")
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(file=sys.stdout)
    with Progress(*columns, numbers, console=console) as bar:
        task = bar.add_task("training", total=steps, completed=first, numbers="")

        def show(step: Step) -> None:
            if _is_due(step, steps, every):
                bar.update(task, numbers=_numbers(step))
            if step.eval_loss is not None:
                console.print(
                    f"step {step.step}: {_evaluated(step.eval_loss, checked)}", highlight=False
                )
            bar.update(task, completed=step.step)

        yield show


def _print_line(step: Step, steps: int, every: int, checked: str) -> None:
    if not _is_due(step, steps, every) and step.eval_loss is None:
        return
    # Both count from the very beginning, also where training goes on.
    left = step.seconds / step.step * (steps - step.step)
    line = f"step {step.step}/{steps}: {_numbers(step)}, {left:.0f} s left"
    if step.eval_loss is not None:
        line += f", {_evaluated(step.eval_loss, checked)}"
    print(line, flush=True)


def _numbers(step: Step) -> str:
    return f"loss {step.loss:.3f}, {step.tokens_per_second:.0f} tokens/s"


def _evaluated(loss: float, checked: str) -> str:
    return f"{checked} loss {loss:.4f}"


def _is_due(step: Step, steps: int, every: int) -> bool:
    return step.step in (1, steps) or step.step % every == 0
