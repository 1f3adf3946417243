"""A forward of 1 to 16 tokens, as in decoding: Bone, loralib's LoRA and the frozen base.

    python -m benchmarks.few_tokens
    python -m benchmarks.few_tokens --tiny    # a tiny model, to try the command

A model is a stack of linear layers with weights of its own. After each single call another model
has its turn, in random order, so that none finds its weights in the cache. Blocks have the dtype of
the base, and LoRA has as many parameters as Bone. A dtype is left out if the processor has no
instructions for it. One thread computes, without gradients. The table has its processor time,
divided within a round: the median, and half the distance of the quartiles.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator, Sequence

import torch

from benchmarks.candidates import BASE, CANDIDATES, adapted_model
from benchmarks.markdown import run_text, spread_text, table
from benchmarks.protocol import Budget, R, Spread, compare, paired_ratios, slow_dtypes
from benchmarks.results import describe
from benchmarks.steps import forward, frozen_stack
from benchmarks.timers import ClockTimer

CPU, LAYERS = torch.device("cpu"), 4
DTYPES, TOKENS = (torch.float32, torch.bfloat16), (1, 2, 4, 8, 16)
RATIOS = {
    "Bone / loralib": ("bone", "loralib"),
    "Bone / base": ("bone", BASE),
    "loralib / base": ("loralib", BASE),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.few_tokens")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the command")
    tiny = parser.parse_args(arguments).tiny
    sizes = (64, Budget(0.0, 2)) if tiny else (1024, Budget(10.0, 50, 400, 50))
    print(run_text(describe(CPU)), end="\n\n")
    print(table(["dtype, tokens", *RATIOS], list(measured(*sizes))))


def measured(width: int, budget: Budget) -> Iterator[list[str]]:
    """Yield the row of each dtype and number of tokens."""
    slow = slow_dtypes(DTYPES, CPU)
    for dtype in [one for one in DTYPES if one not in slow]:
        base = frozen_stack(LAYERS, width, CPU).to(dtype)
        layers = [name for name, _ in base.named_children()]
        models = {
            name: adapted_model(CANDIDATES[name], copy.deepcopy(base), layers, R)
            for name in ("bone", "loralib", BASE)
        }
        for tokens in TOKENS:
            x = torch.randn(tokens, width, dtype=dtype)
            runs = {name: forward(model, x) for name, model in models.items()}
            seconds = compare(runs, budget, ClockTimer(time.process_time))
            ratios = [Spread.of(paired_ratios(seconds, *pair)) for pair in RATIOS.values()]
            yield [f"{str(dtype).removeprefix('torch.')}, {tokens}", *map(spread_text, ratios)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
