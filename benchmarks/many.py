"""The tables of many adapters in one model: loaded side by side, and one after another.

The adapters are loaded in a new process, which has no freed memory to reuse. Its growth is the
operating system's, from the first adapter to the last.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import disha
from benchmarks.memory import status_bytes
from benchmarks.protocol import Budget, R, Run, compare, synchroniser
from benchmarks.steps import forward, frozen_stack

__all__ = ["loaded", "measure", "switching"]

LAYERS, WIDTH, SMALL_R, SAMPLES = 8, 256, 8, 4
BUDGET = Budget(2.0, least_rounds=5, most_rounds=300)
PARTS = (1, 2, 4, 8)
"""What the rank of the loaded adapter is divided by to give those of the files, in turn."""


def loaded(quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """Load many adapters into one model: time of each, resident size, and forwards afterwards."""
    sizes = map(str, (20 if quick else 1000, torch.get_num_threads()))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.many", *sizes],
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
    runs = {}
    for who, model in (("one", few), ("many", many)):
        runs[f"active_of_{who}"] = forward(model, x)
        runs[f"routed_of_{who}"] = _routed(model, x)
    own = sum(block.nbytes for block in disha.adapter_parameters(many, "a0"))
    return {
        "adapters": adapters,
        "layers": LAYERS,
        "width": WIDTH,
        "dtype": "float32",
        "r": SMALL_R,
        "block_bytes": own * (adapters - 1),
        "resident_bytes": None if before is None or after is None else after - before,
        "load_seconds": load_seconds,
        "seconds": compare(runs, BUDGET),
        "left_out": {},
    }


def _base(width: int = WIDTH, device: str | torch.device = "cpu") -> nn.Sequential:
    return frozen_stack(LAYERS, width, torch.device(device))


def _routed(model: nn.Module, x: Tensor) -> Run:
    names = ["a0", None] * (len(x) // 2)

    def run() -> Tensor:
        with torch.no_grad(), disha.route_adapters(model, names):
            return model(x)

    return run


def switching(quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """Time `load_adapter(model, file, replace=True)` for many files in turn.

    The files have several ranks, and every second one adapts half of the layers only.
    """
    width, adapters = (256, 8) if quick else (1024, 64)
    r = min(R, width // 4)
    ranks = [r // part for part in PARTS]
    model = disha.inject_adapters(_base(width, device), "all-linear", r=r)
    wait = synchroniser(device) or (lambda: None)
    x = torch.randn(4, width, device=device)
    with tempfile.TemporaryDirectory() as folder:
        files = [
            _file(Path(folder, f"{number}.safetensors"), number, width, ranks)
            for number in range(adapters)
        ]
        seconds = []
        for file in itertools.islice(itertools.cycle(files), 2 * adapters):
            start = time.perf_counter()
            disha.load_adapter(model, file, replace=True)
            wait()
            seconds.append(time.perf_counter() - start)
            model(x)
    return [
        {
            "adapters": adapters,
            "layers": LAYERS,
            "width": width,
            "dtype": "float32",
            "r": r,
            "ranks": ranks,
            "turns": {"first": seconds[:adapters], "second": seconds[adapters:]},
            "left_out": {},
        }
    ]


def _file(path: Path, number: int, width: int, ranks: list[int]) -> Path:
    target = "all-linear" if number % 2 else rf"[0-{LAYERS // 2 - 1}]"
    r = ranks[number // 2 % len(ranks)]
    disha.save_adapter(disha.inject_adapters(_base(width), target, r=r, init="kaiming"), path)
    return path


if __name__ == "__main__":
    count, threads = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    print(json.dumps(measure(count)))
