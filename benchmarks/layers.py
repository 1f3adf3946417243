"""The tables of one linear layer: a training step, and a forward, eager and compiled."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.candidates import (
    BASE,
    CANDIDATES,
    EVERY_METHOD,
    LAYER_SCALE,
    Candidate,
    adapted_model,
    check_layer,
    check_same_results,
)
from benchmarks.memory import kept_bytes
from benchmarks.protocol import Budget, R, slow_dtypes
from benchmarks.race import Race, run_race
from benchmarks.results import dtype_text
from benchmarks.roofline import Linear, measured_rates
from benchmarks.steps import TrainingStep, forward
from benchmarks.timers import ClockTimer, Run

Case = dict[str, Any]


class Size(NamedTuple):
    """A linear layer, square if no outputs are given, and the number of tokens in its input."""

    width: int
    tokens: int
    dtype: torch.dtype
    outputs: int | None = None
    r: int = R

    @property
    def linear(self) -> Linear:
        return Linear(self.width, self.width if self.outputs is None else self.outputs)

    def described(self) -> Case:
        of_layer = {"width": self.width}
        if self.outputs is not None:
            of_layer["outputs"] = self.outputs
        dtype = dtype_text(self.dtype)
        return {**of_layer, "tokens": self.tokens, "dtype": dtype, "r": self.r}


STEPS = (
    Size(2048, 1024, torch.float32),
    Size(1024, 2048, torch.float32),
    Size(4096, 512, torch.bfloat16),
    Size(1024, 1024, torch.bfloat16),
)
FEW = tuple(
    Size(2048, tokens, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for tokens in (1, 4, 8, 16)
)
WITH_GROUPS = (Size(2048, 512, torch.float32), Size(4096, 512, torch.float32))
LORA_STEPS = (Size(1024, 1024, torch.float32), Size(2048, 512, torch.float32))
LORA_FEW = (Size(2048, 1, torch.float32), Size(2048, 8, torch.float32))

STEP = Race(EVERY_METHOD, Budget(50.0, 7, 100))
FORWARD = Race(EVERY_METHOD, Budget(12.0, 20, 150, 5))
GROUPS = Race(
    (BASE, "bone", "groups2", "groups4", "groups_all", "bone_2r", "peft_lora"),
    Budget(60.0, 5, 60, 2),
    compiled=True,
)
LORAS = Race(
    (BASE, "bone", "lora", "peft_lora", "loralib"),
    Budget(8.0, 20, 200, 3),
    timer=ClockTimer(time.process_time),
)


def sizes(asked: Sequence[Size], device: torch.device) -> list[Size]:
    """Return the sizes in dtypes that the device has instructions for."""
    slow = slow_dtypes({size.dtype for size in asked}, device)
    return [size for size in asked if size.dtype not in slow]


def layer_step(device: torch.device) -> list[Case]:
    """Measure forward and backward of one layer, the gradient of its input included."""
    found = []
    for size in sizes(STEPS, device):
        rates = measured_rates([size.linear], size.tokens, R, size.dtype, device)
        found.append({**layer_case(size, "step", STEP, device), "rates": rates})
    return found


def few_tokens(device: torch.device) -> list[Case]:
    """Measure the forward of one layer for few tokens, without gradients."""
    return [layer_case(size, "forward", FORWARD, device) for size in sizes(FEW, device)]


def groups(device: torch.device) -> list[Case]:
    """Measure a layer with more or fewer groups of shards, beside MiSS and LoRA."""
    return [
        layer_case(size, work, GROUPS, device, memory=True)
        for size in sizes(WITH_GROUPS, device)
        for work in ("forward", "step")
    ]


def loras(device: torch.device) -> list[Case]:
    """Measure three LoRAs and MiSS by processor time, which other work disturbs less."""
    works = {"step": LORA_STEPS, "forward": LORA_FEW}
    return [
        layer_case(size, work, LORAS, device, memory=work == "step")
        for work, asked in works.items()
        for size in asked
    ]


def layer_case(
    size: Size,
    work: str,
    race: Race,
    device: torch.device,
    memory: bool = False,
    copies: int = 1,
) -> Case:
    """Measure one layer, or several that read the same input.

    A step gives the input a gradient too; a forward is without gradients.
    """
    torch.manual_seed(0)
    plain = nn.Linear(*size.linear, bias=False, device=device, dtype=size.dtype)
    plain.requires_grad_(False)
    x = torch.randn(size.tokens, size.width, device=device, dtype=size.dtype)
    candidates = [CANDIDATES[name] for name in race.names]
    models = build_layers(plain, x, size.r, candidates, copies)
    leaf = x.clone().requires_grad_()
    shape = (size.tokens, size.linear.out_features)
    cotangent = torch.randn(shape, device=device, dtype=size.dtype)

    def make(model: nn.Module, called: Any) -> Run:
        if work == "forward":
            return forward(called, x)
        return TrainingStep(model, lambda: called(leaf), [leaf], cotangent)

    case = {**size.described(), "work": work, "layers": copies}
    if memory:
        case["kept_bytes"] = {
            name: kept_bytes(model, lambda model=model: model(leaf))
            for name, model in models.items()
        }
    return {**case, **run_race(models, make, race, device, memory and work == "step")}


class Layers(nn.ModuleList):
    """Layers with weights of their own, which all read one input."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self]


def build_layers(
    plain: nn.Linear, x: Tensor, r: int, candidates: Iterable[Candidate], copies: int = 1
) -> dict[str, nn.Module]:
    """Build and check every candidate, each with its own copies of the weight.

    If candidates shared the weight, each would find it in the cache after the one before. No layer
    of a larger model does.
    """
    models: dict[str, nn.Module] = {}
    outputs = {}
    for candidate in candidates:
        base = Layers(copy.deepcopy(plain) for _ in range(copies))
        names = [name for name, _ in base.named_children()]
        adapted: Any = adapted_model(candidate, base, names, r, LAYER_SCALE)
        outputs[candidate.name] = check_layer(candidate, adapted[0], plain, x)
        models[candidate.name] = adapted[0] if copies == 1 else adapted
    check_same_results(outputs, x.dtype)
    return models
