"""The table of compiled models: a training step of a layer and of a language model, in inductor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.candidates import BASE, CANDIDATES, adapted_model, missing_package
from benchmarks.layers import Size, sizes
from benchmarks.protocol import Budget, R, compare, synchroniser
from benchmarks.steps import TrainingStep, check_gradients, require_gradient
from benchmarks.whole_model import ModelRun, language_model, projections, token_loss

__all__ = ["COMPILED", "compiled"]

COMPILED = "_compiled"
"""What the name of a candidate ends in where its step is compiled."""
TIMED = (BASE, "bone", "bat", "peft_miss", "peft_lora")
MORE_COMPILATIONS = 64
"""The limit of compilations for one piece of code, which all candidates share."""
LAYERS = (Size(1024, 1024, torch.float32), Size(1024, 1024, torch.bfloat16))
QUICK_LAYERS = (Size(256, 64, torch.float32),)
MODEL = ModelRun(torch.float32, batch=1, length=64, layers=2)


def compiled(quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """Time a layer and a language model, compiled and eager."""
    budget = Budget(1.0, 2, 10, 1) if quick else Budget(20.0, 5, 60, 1)
    with torch._dynamo.config.patch(recompile_limit=MORE_COMPILATIONS):
        found = [
            _layer(size, budget, device)
            for size in sizes(QUICK_LAYERS if quick else LAYERS, device)
        ]
        return found if quick else [*found, _model(budget, device)]


def _steps(
    base: nn.Module,
    names: Sequence[str],
    r: int,
    make: Callable[[nn.Module, Any], TrainingStep],
) -> tuple[dict[str, TrainingStep], dict[str, str]]:
    """Return the steps of each candidate, eager and compiled, and who is left out."""
    steps, left_out = {}, {}
    for name in TIMED:
        why = missing_package(CANDIDATES[name])
        if why is not None:
            left_out[name] = why
            continue
        model = adapted_model(CANDIDATES[name], base, names, r)
        steps[name] = make(model, model)
        steps[name]()
        check_gradients(name, model)
        steps[name + COMPILED] = make(model, torch.compile(model))
        steps[name + COMPILED]()  # compiles
    return steps, left_out


def _layer(size: Size, budget: Budget, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    layer = nn.Linear(size.width, size.width, bias=False, device=device, dtype=size.dtype)
    x = torch.randn(size.tokens, size.width, device=device, dtype=size.dtype, requires_grad=True)

    def make(model: nn.Module, called: Any) -> TrainingStep:
        return TrainingStep(model, lambda: called(x).float().square().mean(), [x])

    steps, left_out = _steps(nn.Sequential(layer), ["0"], size.r, make)
    return {
        "what": "timed",
        "width": size.width,
        "tokens": size.tokens,
        "dtype": str(size.dtype).removeprefix("torch."),
        "r": size.r,
        "seconds": compare(steps, budget, synchronise=synchroniser(device)),
        "left_out": left_out,
    }


def _model(budget: Budget, device: torch.device) -> dict[str, Any]:
    base, tokens, labels = language_model(MODEL, device)
    base.model.embed_tokens.register_forward_hook(require_gradient)

    def make(model: nn.Module, called: Any) -> TrainingStep:
        return TrainingStep(model, lambda: token_loss(called, tokens, labels))

    steps, left_out = _steps(base, projections(base), R, make)
    return {
        "what": "timed",
        "model": "SmolLM2-135M",
        "layers": MODEL.layers,
        "tokens": MODEL.batch * MODEL.length,
        "dtype": "float32",
        "r": R,
        "seconds": compare(steps, budget, synchronise=synchroniser(device)),
        "left_out": left_out,
    }
