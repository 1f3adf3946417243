"""The tables of one linear layer: a training step, and a forward of few tokens.

Beside a training step, the rates of its products and of copying are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.candidates import (
    CANDIDATES,
    Candidate,
    adapted_layer,
    check_layer,
    check_same_results,
    missing_package,
)
from benchmarks.protocol import Budget, R, compare, slow_dtypes, synchroniser
from benchmarks.roofline import Linear, measured_rates
from benchmarks.steps import forward, trainable

__all__ = ["Size", "build_layers", "few_tokens", "layer_step", "parameter_counts", "sizes"]

Case = dict[str, Any]


class Size(NamedTuple):
    """A square linear layer, and the number of tokens in its input."""

    width: int
    tokens: int
    dtype: torch.dtype

    @property
    def r(self) -> int:
        """The shard size of its adapters."""
        return min(R, self.width // 8)


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
QUICK_STEPS = (Size(512, 256, torch.float32), Size(512, 256, torch.bfloat16))
QUICK_FEW = (Size(512, 1, torch.float32), Size(512, 8, torch.bfloat16))


def sizes(asked: Sequence[Size], device: torch.device) -> list[Size]:
    """Return the sizes in dtypes that the device has instructions for."""
    slow = slow_dtypes({size.dtype for size in asked}, device)
    return [size for size in asked if size.dtype not in slow]


def layer_step(quick: bool, device: torch.device) -> list[Case]:
    """Measure forward and backward of one layer, the gradient of its input included."""
    budget = Budget(4.0, 3, 20) if quick else Budget(50.0, 7, 100)
    for_rates = Budget(0.5, 2, 10, 1) if quick else Budget(4.0, 7, 40)
    return [
        _measure(size, budget, device, _training_step)
        | {
            "rates": measured_rates(
                [Linear(size.width, size.width)], size.tokens, size.r, size.dtype, device, for_rates
            )
        }
        for size in sizes(QUICK_STEPS if quick else STEPS, device)
    ]


def few_tokens(quick: bool, device: torch.device) -> list[Case]:
    """Measure the forward of one layer for few tokens, without gradients."""
    budget = Budget(2.0, 5, 30) if quick else Budget(12.0, 20, 150, 5)
    asked = sizes(QUICK_FEW if quick else FEW, device)
    return [_measure(size, budget, device, forward) for size in asked]


def _training_step(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    x, cotangent = x.clone().requires_grad_(), torch.randn_like(x)
    leaves = [x, *trainable(layer)]

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        layer(x).backward(cotangent)

    return run


def _measure(
    size: Size,
    budget: Budget,
    device: torch.device,
    make: Callable[[nn.Module, Tensor], Callable[[], object]],
) -> Case:
    torch.manual_seed(0)
    plain = nn.Linear(size.width, size.width, bias=False, device=device, dtype=size.dtype)
    plain.requires_grad_(False)
    x = torch.randn(size.tokens, size.width, device=device, dtype=size.dtype)
    layers, left_out = build_layers(plain, x, size.r, CANDIDATES.values())
    runs = {name: make(layer, x) for name, layer in layers.items()}
    seconds = compare(runs, budget, synchronise=synchroniser(device))
    return {
        "width": size.width,
        "tokens": size.tokens,
        "dtype": str(size.dtype).removeprefix("torch."),
        "r": size.r,
        "parameters": parameter_counts(layers),
        "seconds": seconds,
        "left_out": left_out,
    }


def build_layers(
    plain: nn.Linear, x: Tensor, r: int, candidates: Sequence[Candidate]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Build and check every candidate that can be built, and say why the others can't."""
    layers, outputs, left_out = {}, {}, {}
    for candidate in candidates:
        why = missing_package(candidate)
        if why is not None:
            left_out[candidate.name] = why
            continue
        layers[candidate.name] = adapted_layer(candidate, plain, r)
        outputs[candidate.name] = check_layer(candidate, layers[candidate.name], plain, x)
    check_same_results(outputs, x.dtype)
    return layers, left_out


def parameter_counts(models: Mapping[str, nn.Module]) -> dict[str, int]:
    """Return name -> how many values train."""
    return {
        name: sum(parameter.numel() for parameter in trainable(model))
        for name, model in models.items()
    }
