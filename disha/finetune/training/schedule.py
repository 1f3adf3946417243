"""The learning rate of every step: a linear warm-up, then down to zero or constant.

With T steps, w of them to warm up, and s = 0, 1, ... T - 1:

    s < w       peak * (s + 1) / (w + 1)
    cosine      peak * (1 + cos(pi * (s - w) / (T - w))) / 2
    linear      peak * (T - s) / (T - w)
    constant    peak

After the warm-up these are the usual formulas. The usual warm-up is s / w, whose first step has the
rate zero and so learns nothing; ours begins one part higher. No step has the rate zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from disha.finetune.settings.training import ScheduleName

__all__ = ["Schedule"]

# The part of the peak by the part of the steps after the warm-up that is left, from 1 to above 0.
# The cosine's is written as a sine, which stays above 0 where 1 + cos would be rounded to it.
DECAYS: Mapping[ScheduleName, Callable[[float], float]] = {
    "cosine": lambda left: math.sin(math.pi / 2 * left) ** 2,
    "linear": lambda left: left,
    "constant": lambda left: 1.0,
}


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then what `name` says.

    Args:
        name: cosine, linear or constant.
        peak: the highest learning rate.
        steps: how many optimiser steps there are.
        warmup: how many of them warm up.
    """

    name: ScheduleName
    peak: float
    steps: int
    warmup: int

    def learning_rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ... `steps` - 1; none of them is zero."""
        if step < self.warmup:
            return self.peak * (step + 1) / (self.warmup + 1)
        return self.peak * DECAYS[self.name]((self.steps - step) / (self.steps - self.warmup))
