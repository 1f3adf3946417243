"""`python -m benchmarks`: measure, and write a file of results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.experts import experts
from benchmarks.layers import few_tokens, groups, layer_step, loras
from benchmarks.many import many
from benchmarks.memory import memory
from benchmarks.passes import passes
from benchmarks.results import describe, measure
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
    "many": many,
    "passes": passes,
    "experts": experts,
    "groups": groups,
    "loras": loras,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the tables that the command line names, and return 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=list(TABLES), metavar="TABLE", help=f"of: {', '.join(TABLES)}"
    )
    parser.add_argument("--out", type=Path, default=Path("bench-output/results.json"))
    asked = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tables = {name: partial(TABLES[name], device) for name in asked.only or TABLES}
    return measure(tables, describe(device), asked.out)


if __name__ == "__main__":
    sys.exit(main())
