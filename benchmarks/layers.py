"""The tables of one linear layer: a training step, and a forward of few tokens.

Beside a training step, the rates of its products and of copying are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.candidates import (
    CANDIDATES,
    Candidate,
    adapted_layer,
    check_layer,
    check_same_results,
)
from benchmarks.protocol import Budget, R, compare, slow_dtypes
from benchmarks.results import dtype_text
from benchmarks.roofline import Linear, measured_rates
from benchmarks.steps import forward, trainable

Case = dict[str, Any]


class Size(NamedTuple):
    """A square linear layer, and the number of tokens in its input."""

    width: int
    tokens: int
    dtype: torch.dtype

    def described(self) -> Case:
        dtype = dtype_text(self.dtype)
        return {"width": self.width, "tokens": self.tokens, "dtype": dtype, "r": R}


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


def sizes(asked: Sequence[Size], device: torch.device) -> list[Size]:
    """Return the sizes in dtypes that the device has instructions for."""
    slow = slow_dtypes({size.dtype for size in asked}, device)
    return [size for size in asked if size.dtype not in slow]


def layer_step(device: torch.device) -> list[Case]:
    """Measure forward and backward of one layer, the gradient of its input included."""
    found = []
    for size in sizes(STEPS, device):
        case = _measure(size, Budget(50.0, 7, 100), device, training_step)
        layer = Linear(size.width, size.width)
        rates = measured_rates([layer], size.tokens, R, size.dtype, device)
        found.append({**case, "rates": rates})
    return found


def few_tokens(device: torch.device) -> list[Case]:
    """Measure the forward of one layer for few tokens, without gradients."""
    budget = Budget(12.0, 20, 150, 5)
    return [_measure(size, budget, device, forward) for size in sizes(FEW, device)]


def training_step(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    """Return a forward and backward of the layer, which give its input a gradient too."""
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
    layers = build_layers(plain, x, R, CANDIDATES.values())
    runs = {name: make(layer, x) for name, layer in layers.items()}
    return {**size.described(), "seconds": compare(runs, budget)}


def build_layers(
    plain: nn.Linear, x: Tensor, r: int, candidates: Iterable[Candidate]
) -> dict[str, nn.Module]:
    """Build and check every candidate."""
    layers, outputs = {}, {}
    for candidate in candidates:
        layers[candidate.name] = adapted_layer(candidate, plain, r)
        outputs[candidate.name] = check_layer(candidate, layers[candidate.name], plain, x)
    check_same_results(outputs, x.dtype)
    return layers
