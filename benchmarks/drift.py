"""`python -m benchmarks.drift`: how far merging and unmerging moves the base.

Each cycle merges an adapter into the weights and takes it out, as a trainer does that sends merged
weights to a server in each step. Between cycles the adapter's values are drawn anew. PEFT computes
W + dW and then W - dW, each rounded to the base's dtype; disha keeps W.

Writes benchmarks/results/drift.json; `python -m benchmarks.report` writes the page.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import disha
from benchmarks.markdown import run_text, table
from benchmarks.results import describe, dtype_text, read_results, write_results
from benchmarks.steps import trainable
from benchmarks.timers import ClockTimer

RESULTS = Path(__file__).parent / "results/drift.json"
CYCLES = 1000
SIZE, R = 256, 16
UPDATE = 0.002
"""Standard deviation of dW; that of W is 0.02, as in a language model."""

Parts = tuple[Callable[[], object], Callable[[], object], Callable[[], torch.Tensor]]
"""How an adapted model is merged and unmerged, and what its base weight is."""


def _with_disha(model: nn.Sequential) -> Parts:
    disha.inject_adapters(model, "0", r=R)
    layer: Any = model[0]
    merge, unmerge = (partial(one, model) for one in (disha.merge_adapters, disha.unmerge_adapters))
    return merge, unmerge, lambda: layer.base_weight


def _with_peft(kind: str, model: nn.Sequential) -> Parts:
    import peft

    miss = peft.MissConfig(r=R, target_modules=["0"])
    lora = peft.LoraConfig(r=R, lora_alpha=R, target_modules=["0"])
    adapted = peft.get_peft_model(model, lora if kind == "lora" else miss)
    layer: Any = adapted.base_model.model[0]
    return adapted.merge_adapter, adapted.unmerge_adapter, lambda: layer.base_layer.weight


KINDS: Mapping[str, Callable[[nn.Sequential], Parts]] = {
    "disha (MiSS)": _with_disha,
    "PEFT MiSS": partial(_with_peft, "miss"),
    "PEFT LoRA": partial(_with_peft, "lora"),
}


def measure(kind: str, dtype: torch.dtype, cycles: int) -> dict[str, Any]:
    """Return how far the base has moved after these cycles, relative to its mean size."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False)).to(dtype)
    nn.init.normal_(model[0].weight, std=0.02)
    merge, unmerge, weight = KINDS[kind](model)
    before = weight().detach().double().clone()
    trained = trainable(model)
    # Of two factors, such that the entries of their product have the standard deviation UPDATE too.
    std = UPDATE if len(trained) == 1 else (UPDATE / R**0.5) ** 0.5
    timer = ClockTimer()
    seconds: dict[str, list[float]] = {"merge": [], "unmerge": []}
    for _ in range(cycles):
        for parameter in trained:
            nn.init.normal_(parameter, std=std)
        seconds["merge"].append(timer.seconds(merge))
        seconds["unmerge"].append(timer.seconds(unmerge))
    moved = (weight().detach().double() - before).abs()
    size = before.abs().mean()
    return {
        "kind": kind,
        "dtype": dtype_text(dtype),
        "cycles": cycles,
        "mean": float(moved.mean() / size),
        "largest": float(moved.max() / size),
        "changed": float((moved != 0).double().mean()),
        **{f"{name}_seconds": statistics.median(found) for name, found in seconds.items()},
    }


def drift(cycles: int = CYCLES) -> list[dict[str, Any]]:
    """Measure all kinds in both dtypes."""
    dtypes = (torch.bfloat16, torch.float16)
    return [measure(kind, dtype, cycles) for dtype in dtypes for kind in KINDS]


def drift_table(results: Mapping[str, Any]) -> str:
    """Return the table in Markdown."""
    rows = [
        [
            case["dtype"],
            case["kind"],
            f"{case['changed']:.0%}",
            f"{case['mean']:.2%}",
            f"{case['largest']:.1%}",
            f"{case['merge_seconds'] * 1e6:,.0f} µs",
            f"{case['unmerge_seconds'] * 1e6:,.0f} µs",
        ]
        for case in results["tables"]["drift"]
    ]
    header = ["base", "adapter", "weights changed", "mean change", "largest", "merge", "unmerge"]
    return f"{table(header, rows)}\n{run_text(results)}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the results, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drift")
    parser.add_argument("--cycles", type=int, default=CYCLES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args(arguments)
    results = describe(torch.device("cpu"))
    results["tables"]["drift"] = drift(asked.cycles)
    write_results(asked.out, results)
    print(drift_table(read_results(asked.out)))


if __name__ == "__main__":
    sys.exit(main())
