"""The table of many adapters, loaded side by side into one model.

The adapters are loaded in a new process, which has no freed memory to reuse. Its growth is the
operating system's, from the first adapter to the last.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import disha
from benchmarks.memory import status_bytes
from benchmarks.protocol import Budget, compare
from benchmarks.steps import forward, frozen_stack

ADAPTERS, LAYERS, WIDTH, SMALL_R, SAMPLES = 1000, 8, 256, 8, 4
BUDGET = Budget(2.0, least_rounds=5, most_rounds=300)


def loaded(device: torch.device) -> list[dict[str, Any]]:
    """Load many adapters into one model: time of each, resident size, and forwards afterwards."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.many"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    return [json.loads(done.stdout.splitlines()[-1])]


def measure(adapters: int) -> dict[str, Any]:
    """Return the case of a model on the CPU that holds this many adapters."""
    few, many = _base(), _base()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "adapter.safetensors")
        disha.save_adapter(
            disha.inject_adapters(_base(), "all-linear", SMALL_R, init="kaiming"), path
        )
        for model in (few, many):
            disha.load_adapter(model, path, adapter="a0")
        before, load_seconds = status_bytes("VmRSS"), []
        for number in range(1, adapters):
            start = time.perf_counter()
            disha.load_adapter(many, path, adapter=f"a{number}", activate=False)
            load_seconds.append(time.perf_counter() - start)
    after = status_bytes("VmRSS")
    x = torch.randn(SAMPLES, WIDTH)
    runs = {"active_of_one": forward(few, x), "active_of_many": forward(many, x)}
    own = sum(block.nbytes for block in disha.adapter_parameters(many, "a0"))
    sizes = {"adapters": adapters, "layers": LAYERS, "width": WIDTH, "r": SMALL_R}
    return {
        **sizes,
        "block_bytes": own * (adapters - 1),
        "resident_bytes": None if before is None or after is None else after - before,
        "load_seconds": load_seconds,
        "seconds": compare(runs, BUDGET),
    }


def _base() -> nn.Sequential:
    return frozen_stack(LAYERS, WIDTH, torch.device("cpu"))


if __name__ == "__main__":
    print(json.dumps(measure(ADAPTERS)))
