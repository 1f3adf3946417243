"""Prints the phases of a run with their times, and its steps.

If several processes train, the first one prints.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeAlias, TypeVar

from tqdm import tqdm  # type: ignore[import-untyped]

from disha.finetune.training.loop import Step
from disha.text import tell

__all__ = ["Clock", "ShowStep", "showing_progress"]

T = TypeVar("T")

ShowStep: TypeAlias = Callable[[Step], None]
"""Shows an optimizer step."""


class Clock:
    """Prints each phase of a run, and the time it took.

    Args:
        prints: whether this process prints.
    """

    def __init__(self, prints: bool = True) -> None:
        self._prints = prints
        self.seconds: dict[str, float] = {}

    def say(self, line: str) -> None:
        """Print a line. Characters that the output can't encode are escaped."""
        if self._prints:
            encoding = sys.stdout.encoding or "utf-8"
            tell(line.encode(encoding, "backslashreplace").decode(encoding), sys.stdout)

    def watched(self, items: Iterable[T], total: int, label: str) -> Iterator[T]:
        """Yield items, and move a bar if this is a terminal."""
        hidden = None if self._prints else True  # None shows the bar only on a terminal
        yield from tqdm(items, label, total, leave=False, file=sys.stdout, disable=hidden)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Print the name of a phase, run the block, and print how long it took."""
        self.say(f"{name} ...")
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
        self.say(f"  {self.seconds[name]:.1f} s")


@contextmanager
def showing_progress(
    steps: int, every: int, *, first: int = 0, checked: str = "held-out", shown: bool = True
) -> Iterator[ShowStep]:
    """Yield a function that shows each step: loss, tokens per second and time left.

    On a terminal, the function moves a bar; elsewhere, it prints lines.

    Args:
        steps: how many steps the run has in total.
        every: show new numbers every this many steps.
        first: how many of the steps an earlier part of the run has done.
        checked: the name of the rows that the loss is measured on.
        shown: whether this process prints.
    """

    def is_due(step: Step) -> bool:
        return step.step in (1, steps) or step.step % every == 0

    def print_line(step: Step) -> None:
        if is_due(step) or step.eval_loss is not None:
            # Step and seconds include the part of the run before a resume.
            left = step.seconds / step.step * (steps - step.step)
            line = f"step {step.step}/{steps}: {_numbers(step)}, {left:.0f} s left"
            tell(line + _evaluated(", ", step, checked), sys.stdout)

    if not shown:
        yield lambda step: None
        return
    if not sys.stdout.isatty():
        yield print_line
        return
    with tqdm(desc="training", total=steps, initial=first, file=sys.stdout) as bar:

        def move_bar(step: Step) -> None:
            if is_due(step):
                bar.set_postfix_str(_numbers(step), refresh=False)
            if step.eval_loss is not None:
                with suppress(OSError):  # a bar itself bears a closed terminal
                    bar.write(_evaluated(f"step {step.step}: ", step, checked), file=sys.stdout)
            bar.update(step.step - bar.n)

        yield move_bar


def _numbers(step: Step) -> str:
    return f"loss {step.loss:.3f}, {step.tokens_per_second:.0f} tokens/s"


def _evaluated(before: str, step: Step, checked: str) -> str:
    if step.eval_loss is None:
        return ""
    exact = step.eval_exact_match
    answers = "" if exact is None else f", {exact:.1%} of answers exact"
    return f"{before}{checked} loss {step.eval_loss:.4f}{answers}"
