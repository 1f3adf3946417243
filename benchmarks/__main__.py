"""`python -m benchmarks`: measure, and write a file of results."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.experts import experts
from benchmarks.layers import few_tokens, groups, layer_step, loras
from benchmarks.memory import memory
from benchmarks.results import describe, write_results
from benchmarks.routed import routed
from benchmarks.start_up import start_up
from benchmarks.whole_model import model_step

TABLES: Mapping[str, Callable[[torch.device], list[dict[str, Any]]]] = {
    "layer_step": layer_step,
    "few_tokens": few_tokens,
    "model_step": model_step,
    "memory": memory,
    "start_up": start_up,
    "routed": routed,
    "experts": experts,
    "groups": groups,
    "loras": loras,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the tables that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=list(TABLES), metavar="TABLE", help=f"of: {', '.join(TABLES)}"
    )
    parser.add_argument("--out", type=Path, default=Path("bench-output/results.json"))
    asked = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = describe(device)
    for name in asked.only or TABLES:
        started = time.perf_counter()
        results["tables"][name] = TABLES[name](device)
        results["table_seconds"][name] = time.perf_counter() - started
        write_results(asked.out, results)  # a run that is stopped keeps the tables it has
        print(f"{name}: {results['table_seconds'][name]:.0f} s", flush=True)
    print(f"results: {asked.out}")


if __name__ == "__main__":
    sys.exit(main())
