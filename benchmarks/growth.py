"""How the time of each operation grows with the number of layers.

    python -m benchmarks.growth

Models whose experts are not fused have tens of thousands of layers. An operation of linear cost
takes four times as long for four times as many layers.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from torch import nn

import disha

FACTOR = 4


def measure(layers: int, folder: Path) -> dict[str, float]:
    """Return operation -> seconds, for a model of so many small layers."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
    file = folder / "a.safetensors"
    operations: dict[str, Callable[[], object]] = {
        "inject": lambda: disha.inject_adapters(model, "all-linear", r=2, init="kaiming"),
        "list parameters": lambda: disha.adapter_parameters(model),
        "scale": lambda: disha.set_adapter_scale(model, 0.5),
        "state dict": lambda: disha.adapter_state_dict(model),
        "save": lambda: disha.save_adapter(model, file),
        "load": lambda: disha.load_adapter(model, file, adapter="loaded"),
        "merge": lambda: disha.merge_adapters(model),
        "unmerge": lambda: disha.unmerge_adapters(model),
        "remove": lambda: disha.remove_adapters(model),
    }
    seconds = {}
    for name, operation in operations.items():
        start = time.perf_counter()
        operation()
        seconds[name] = time.perf_counter() - start
    return seconds


def main() -> None:
    """Print a row for each operation."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--layers", type=int, default=2000)
    layers = parser.parse_args().layers
    with tempfile.TemporaryDirectory() as name:
        few = measure(layers, Path(name))
        many = measure(FACTOR * layers, Path(name))
    print(f"{'':16}{layers:>8,} layers {FACTOR * layers:>8,} layers   growth")
    for operation, seconds in few.items():
        growth = many[operation] / seconds
        print(f"{operation:16}{seconds:>13.2f} s {many[operation]:>13.2f} s {growth:>8.1f}")


if __name__ == "__main__":
    main()
