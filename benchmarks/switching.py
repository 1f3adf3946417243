"""The table of switching: one adapter after another takes the place of the loaded one."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import disha
from benchmarks.protocol import synchroniser
from benchmarks.settings import Profile, R

__all__ = ["switching"]

LAYERS = 8
PARTS = (1, 2, 4, 8)
"""What the rank of the loaded adapter is divided by to give those of the files, in turn."""


def switching(profile: Profile, device: torch.device) -> list[dict[str, Any]]:
    """Time `load_adapter(model, file, replace=True)` for many files in turn.

    The files have several ranks, and every second one adapts half of the layers only.
    """
    width, adapters = profile.routed_width, profile.switched_adapters
    r = min(R, width // 4)
    ranks = [r // part for part in PARTS]
    model = disha.inject_adapters(_base(width, device), "all-linear", r=r)
    wait = synchroniser(device) or (lambda: None)
    x = torch.randn(4, width, device=device)
    with tempfile.TemporaryDirectory() as folder:
        files = [_file(Path(folder), number, width, ranks) for number in range(adapters)]
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


def _base(width: int, device: torch.device) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, device=device) for _ in range(LAYERS)))


def _file(folder: Path, number: int, width: int, ranks: Sequence[int]) -> Path:
    target = "all-linear" if number % 2 else rf"[0-{LAYERS // 2 - 1}]"
    r = ranks[number // 2 % len(ranks)]
    model = _base(width, torch.device("cpu"))
    disha.inject_adapters(model, target, r=r, init="kaiming")
    path = folder / f"{number}.safetensors"
    disha.save_adapter(model, path)
    return path
