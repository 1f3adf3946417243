"""What a call of a small layer costs, beside another version of disha, paired in one process.

    python -m benchmarks.per_call path/to/another/checkout --out bench-output/per-call.json

For layers this small the time is that of Python, not of products. Each figure is the least time of
many short runs in shuffled order, which other load on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import importlib
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from benchmarks.results import describe, write_results

WIDTHS, TOKENS, R = (64, 256), 4, 8
MODES = ("without gradients", "with gradients", "training step")
ROUNDS, CALLS = 150, 40


def main() -> None:
    """Time both versions and print the ratios."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.per_call", description=__doc__)
    parser.add_argument("other", type=Path, help="the folder with the other version's disha/")
    parser.add_argument("--out", type=Path, metavar="PATH", help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    versions = {"other": imported_from(arguments.other), "this": imported_from(Path.cwd())}
    rows = [row for width in WIDTHS for row in timed(versions, width)]
    print("width method mode                    this      other  ratio")
    for row in rows:
        times = f"{row['this']:6.1f} us {row['other']:6.1f} us  {row['ratio']:.3f}"
        print(f"{row['width']:5} {row['method']:6} {row['mode']:18} {times}")
    if arguments.out:
        about = describe("per call", torch.device("cpu"))
        write_results(arguments.out, {**about, "rows": rows})


def imported_from(folder: Path) -> ModuleType:
    """Import disha from a folder, beside versions that are imported already."""
    for name in [name for name in sys.modules if name.split(".")[0] == "disha"]:
        del sys.modules[name]
    sys.path.insert(0, str(folder.resolve()))
    try:
        package = importlib.import_module("disha")
    finally:
        sys.path.pop(0)
    assert Path(str(package.__file__)).is_relative_to(folder.resolve()), package.__file__
    return package


def timed(versions: dict[str, ModuleType], width: int) -> list[dict[str, Any]]:
    """Return a row for each method and mode."""
    layers = {
        (version, method): adapted(package, width, method)
        for version, package in versions.items()
        for method in ("bone", "bat")
    }
    rows = []
    for mode in MODES:
        best = dict.fromkeys(layers, float("inf"))
        for _ in range(ROUNDS):
            for key in random.sample(list(layers), len(layers)):
                best[key] = min(best[key], seconds(layers[key], width, mode) * 1e6)
        for method in ("bone", "bat"):
            this, other = best["this", method], best["other", method]
            rows.append(
                {"width": width, "method": method, "mode": mode, "this": this, "other": other}
                | {"ratio": this / other}
            )
    return rows


def adapted(package: Any, width: int, method: str) -> nn.Module:
    """Return a linear layer with an adapter of one version."""
    torch.manual_seed(0)
    layer: nn.Module = package.inject_adapters(
        nn.Linear(width, width), "all-linear", R, method=method
    )
    return layer


def seconds(layer: Callable[..., torch.Tensor], width: int, mode: str) -> float:
    """Return the seconds of one call, averaged over a short run."""
    x = torch.ones(TOKENS, width, requires_grad=mode == "training step")
    with torch.set_grad_enabled(mode != "without gradients"):
        start = time.perf_counter()
        for _ in range(CALLS):
            output = layer(x)
            if mode == "training step":
                output.sum().backward()
        return (time.perf_counter() - start) / CALLS


if __name__ == "__main__":
    main()
