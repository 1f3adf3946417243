"""The tables of one linear layer: a training step, and a forward of few tokens.

Beside a training step, the rates of its products and of copying are measured, and the pieces of
Bone's step alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
from benchmarks.cost_model import Linear
from benchmarks.protocol import Budget, compare, synchroniser
from benchmarks.rates import bone_pieces, measured_rates
from benchmarks.settings import LayerSize, Profile, R
from benchmarks.steps import forward, trainable

__all__ = ["build_layers", "few_tokens", "layer_step", "parameter_counts"]

Case = dict[str, Any]


def layer_step(profile: Profile, device: torch.device) -> list[Case]:
    """Measure forward and backward of one layer, the gradient of its input included."""
    return [
        _measure(size, profile.layer_step_budget, device, _training_step)
        | _beside(size, profile.rates_budget, device)
        for size in profile.layer_steps
    ]


def _beside(size: LayerSize, budget: Budget, device: torch.device) -> Case:
    """Return the rates for a size, and the times of Bone's pieces."""
    width, tokens, r, dtype = size.width, size.tokens, _shard_size(size), size.dtype
    return {
        "rates": measured_rates([Linear(width, width)], tokens, r, dtype, device, budget),
        "pieces": bone_pieces(width, tokens, r, dtype, device, budget),
    }


def _shard_size(size: LayerSize) -> int:
    return min(R, size.width // 8)


def few_tokens(profile: Profile, device: torch.device) -> list[Case]:
    """Measure the forward of one layer for few tokens, without gradients."""
    return [
        _measure(size, profile.few_tokens_budget, device, forward) for size in profile.few_tokens
    ]


def _training_step(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    x, cotangent = x.clone().requires_grad_(), torch.randn_like(x)
    leaves = [x, *trainable(layer)]

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        layer(x).backward(cotangent)

    return run


def _measure(
    size: LayerSize,
    budget: Budget,
    device: torch.device,
    make: Callable[[nn.Module, Tensor], Callable[[], object]],
) -> Case:
    torch.manual_seed(0)
    plain = nn.Linear(size.width, size.width, bias=False, device=device, dtype=size.dtype)
    plain.requires_grad_(False)
    x = torch.randn(size.tokens, size.width, device=device, dtype=size.dtype)
    layers, left_out = build_layers(plain, x, _shard_size(size), CANDIDATES.values())
    runs = {name: make(layer, x) for name, layer in layers.items()}
    seconds = compare(runs, budget, synchronise=synchroniser(device))
    return {
        "width": size.width,
        "tokens": size.tokens,
        "dtype": str(size.dtype).removeprefix("torch."),
        "r": _shard_size(size),
        "parameters": parameter_counts(layers),
        "seconds": seconds,
        "left_out": left_out,
    }


def build_layers(
    plain: nn.Linear, x: Tensor, r: int, candidates: Sequence[Candidate]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Build and check every candidate that can be built, and say why the others can't.

    Args:
        plain: the layer without any adapter.
        x: input to check them on.
        r: the shard size.
        candidates: what to build.

    Returns:
        name -> layer, and name -> why it is left out.

    Raises:
        CandidateError: a candidate does not compute what it should.
    """
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
