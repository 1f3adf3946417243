"""The table of groups of shards: a layer with more or fewer groups, beside MiSS and LoRA.

A MiSS with shards of 2 r inputs has as high a rank as two groups, but twice the parameters. All
other adapters have as many as MiSS with r.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import disha
from benchmarks.candidates import BASE, CANDIDATES, Candidate, adapted_layer, check_layer
from benchmarks.compiled import COMPILED, MORE_COMPILATIONS
from benchmarks.layers import Case, Size, sizes, training_step
from benchmarks.memory import kept_bytes
from benchmarks.protocol import Budget, R, compare
from benchmarks.steps import forward

SIZES = (Size(2048, 512, torch.float32), Size(4096, 512, torch.float32))
BUDGET = Budget(60.0, 5, 60, 2)

Make = Callable[[nn.Module, Tensor], Callable[[], object]]

WORKS: Mapping[str, Make] = {"forward": forward, "step": training_step}
"""What is timed: a forward without gradients, or forward and backward."""


def _grouped(name: str, title: str, groups: Any) -> Candidate:
    def adapt(model: nn.Module, names: Sequence[str], r: int) -> None:
        disha.inject_adapters(model, lambda name, _: name in names, r, groups=groups)

    return Candidate(name, title, name, adapt)


def _with_double_shards(model: nn.Module, names: Sequence[str], r: int) -> None:
    disha.inject_adapters(model, lambda name, _: name in names, 2 * r)


WITH_GROUPS: Mapping[str, Candidate] = {
    candidate.name: candidate
    for candidate in (
        CANDIDATES[BASE],
        CANDIDATES["bone"],
        _grouped("groups2", "MiSS, 2 groups", 2),
        _grouped("groups4", "MiSS, 4 groups", 4),
        _grouped("groups_all", "MiSS, n groups", "all"),
        Candidate("bone_2r", "MiSS of size 2 r", "bone_2r", _with_double_shards),
        CANDIDATES["peft_lora"],
    )
}


def groups(device: torch.device) -> list[Case]:
    """Time a forward and a training step of one layer, eager and compiled."""
    with torch._dynamo.config.patch(recompile_limit=MORE_COMPILATIONS):
        return [_measure(size, work, device) for size in sizes(SIZES, device) for work in WORKS]


def _measure(size: Size, work: str, device: torch.device) -> Case:
    torch.manual_seed(0)
    plain = nn.Linear(size.width, size.width, bias=False, device=device, dtype=size.dtype)
    plain.requires_grad_(False)
    x = torch.randn(size.tokens, size.width, device=device, dtype=size.dtype)
    runs = {}
    kept = {}
    for name, candidate in WITH_GROUPS.items():
        layer = adapted_layer(candidate, plain, R)
        check_layer(candidate, layer, plain, x)
        kept[name] = _kept_bytes(layer, x)
        runs[name] = WORKS[work](layer, x)
        runs[name + COMPILED] = WORKS[work](torch.compile(layer), x)
        runs[name + COMPILED]()  # compiles
    return {
        **size.described(),
        "work": work,
        "kept_bytes": kept,
        "seconds": compare(runs, BUDGET),
    }


def _kept_bytes(layer: nn.Module, x: Tensor) -> int:
    x = x.clone().requires_grad_()
    return kept_bytes(layer, lambda: layer(x))
