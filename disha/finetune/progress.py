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
def showing_progress(steps: int, every: int) -> Iterator[ShowStep]:
    """Yield what shows each step: loss, tokens per second and time left.

    Args:
        steps: how many steps there will be.
        every: renew the numbers every so many steps.
    """
    if not sys.stdout.isatty():
        yield lambda step: _print_line(step, steps, every)
        return
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(total=steps, desc="training", unit="step", file=sys.stdout) as bar:

        def show(step: Step) -> None:
            if _is_due(step, steps, every):
                numbers = f"loss {step.loss:.3f}, {step.tokens_per_second:.0f} tokens/s"
                bar.set_postfix_str(numbers, refresh=False)
            if step.eval_loss is not None:
                bar.write(f"step {step.step}: held-out loss {step.eval_loss:.4f}")
            bar.update()

        yield show


def _print_line(step: Step, steps: int, every: int) -> None:
    if not _is_due(step, steps, every) and step.eval_loss is None:
        return
    left = step.seconds / step.step * (steps - step.step)
    line = (
        f"step {step.step}/{steps}: loss {step.loss:.3f}, {step.tokens_per_second:.0f} tokens/s, "
        f"{left:.0f} s left"
    )
    if step.eval_loss is not None:
        line += f", held-out loss {step.eval_loss:.4f}"
    print(line, flush=True)


def _is_due(step: Step, steps: int, every: int) -> bool:
    return step.step in (1, steps) or step.step % every == 0
