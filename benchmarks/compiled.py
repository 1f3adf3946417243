"""The table of compiled models: a training step of a layer and of a language model, in inductor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.candidates import BASE, CANDIDATES, adapted_model
from benchmarks.layers import Size, sizes
from benchmarks.protocol import Budget, R, compare
from benchmarks.steps import TrainingStep, check_gradients, require_gradient
from benchmarks.whole_model import ModelRun, language_model, projections, token_loss

COMPILED = "_compiled"
"""What the name of a candidate ends in where its step is compiled."""
TIMED = (BASE, "bone", "bat", "peft_miss", "peft_lora")
MORE_COMPILATIONS = 64
"""The limit of compilations for one piece of code, which all candidates share."""
LAYERS = (Size(1024, 1024, torch.float32), Size(1024, 1024, torch.bfloat16))
MODEL = ModelRun(torch.float32, batch=1, length=64, layers=2)
BUDGET = Budget(20.0, 5, 60, 1)


def compiled(device: torch.device) -> list[dict[str, Any]]:
    """Time a layer and a language model, compiled and eager."""
    with torch._dynamo.config.patch(recompile_limit=MORE_COMPILATIONS):
        return [*(_layer(size, device) for size in sizes(LAYERS, device)), _model(device)]


def _timed(
    base: nn.Module, names: Sequence[str], make: Callable[[nn.Module, Any], TrainingStep]
) -> dict[str, list[float]]:
    """Time the steps of each candidate, eager and compiled."""
    steps = {}
    for name in TIMED:
        model = adapted_model(CANDIDATES[name], base, names, R)
        steps[name] = make(model, model)
        steps[name]()
        check_gradients(name, model)
        steps[name + COMPILED] = make(model, torch.compile(model))
        steps[name + COMPILED]()  # compiles
    return compare(steps, BUDGET)


def _layer(size: Size, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    layer = nn.Linear(size.width, size.width, bias=False, device=device, dtype=size.dtype)
    x = torch.randn(size.tokens, size.width, device=device, dtype=size.dtype, requires_grad=True)

    def make(model: nn.Module, called: Any) -> TrainingStep:
        return TrainingStep(model, lambda: called(x).float().square().mean(), [x])

    return {**size.described(), "seconds": _timed(nn.Sequential(layer), ["0"], make)}


def _model(device: torch.device) -> dict[str, Any]:
    base, tokens, labels = language_model(MODEL, device)
    base.model.embed_tokens.register_forward_hook(require_gradient)

    def make(model: nn.Module, called: Any) -> TrainingStep:
        return TrainingStep(model, lambda: token_loss(called, tokens, labels))

    return {**MODEL.described(), "seconds": _timed(base, projections(base), make)}
