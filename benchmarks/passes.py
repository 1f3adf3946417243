"""The table of passes: where MiSS's step spends its time above the frozen one, and what was tried.

Each pass is timed alone, beside whole steps in which passes are computed in another way. All of it
is processor time, in one process, divided by the frozen step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.candidates import BASE, LAYER_SCALE
from benchmarks.layers import STEPS, Size, sizes
from benchmarks.protocol import Budget, Run, compare
from benchmarks.steps import CandidateError
from benchmarks.timers import ClockTimer
from disha.functional import Update, adapted_linear, method_of

BUDGET = Budget(8.0, 7, 200)

Backward = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(dY, S, W, D) -> dX and dD."""


def passes(device: torch.device) -> list[dict[str, Any]]:
    """Measure the passes of a step of one layer, and other ways to compute them."""
    return [_measure(size, device) for size in sizes(STEPS, device)]


def _measure(size: Size, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)

    def new(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(size.dtype)

    x = new(size.tokens, size.width).requires_grad_()
    weight = new(size.width, size.width, scale=size.width**-0.5)
    block = new(size.r, size.width, scale=LAYER_SCALE).requires_grad_()
    cotangent = new(size.tokens, size.width)
    steps = _steps(x, weight, block)
    _check(steps, x, block, cotangent)

    def run_step(forward: Callable[[], Tensor]) -> None:
        x.grad = block.grad = None
        forward().backward(cotangent)

    runs: dict[str, Run] = {name: partial(run_step, forward) for name, forward in steps.items()}
    runs |= _passes(x.detach(), block.detach(), cotangent)
    seconds = compare(runs, BUDGET, ClockTimer(time.process_time))
    return {**size.described(), "seconds": seconds}


def _passes(x: Tensor, block: Tensor, cotangent: Tensor) -> dict[str, Run]:
    """Return each pass of MiSS that the frozen layer does not have."""
    r = block.shape[0]
    sums, matrix = _shards(x, r).sum(1), _sum_matrix(x, r)
    output, grad_x = torch.randn_like(cotangent), torch.randn_like(x)
    grad_sums = torch.randn_like(sums)
    return {
        "S = S(x)": lambda: _shards(x, r).sum(1),
        "Y += S D": lambda: output.addmm_(sums, block),
        "dS = dY D^T": lambda: torch.mm(cotangent, block.T),
        "dD = S^T dY": lambda: torch.mm(sums.T, cotangent),
        "dX += dS": lambda: _shards(grad_x, r).add_(grad_sums.unsqueeze(1)),
        "S by a 0/1 matrix": lambda: torch.mm(x, matrix),
        "dX += dS by a 0/1 matrix": lambda: grad_x.addmm_(grad_sums, matrix.T),
    }


def _steps(x: Tensor, weight: Tensor, block: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return the forward of each way, whose backward autograd knows."""
    r = block.shape[0]
    matrix = _sum_matrix(x, r)
    beside = torch.cat([weight.T, block.detach()])  # a second copy of W that stays in memory
    update = Update(method_of("bone"), block)

    def product(x: Tensor, weight: Tensor, block: Tensor, sums: Tensor) -> Tensor:
        return torch.mm(x, weight.T).addmm_(sums, block)

    def usual(x: Tensor, weight: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
        sums = _shards(x, r).sum(1)
        return product(x, weight, block, sums), sums

    def by_matrix(x: Tensor, weight: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
        sums = torch.mm(x, matrix)
        return product(x, weight, block, sums), sums

    def in_one_product(x: Tensor, weight: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
        sums = _shards(x, r).sum(1)
        beside[x.shape[1] :] = block
        return torch.mm(torch.cat([x, sums], 1), beside), sums

    def usual_back(grad: Tensor, sums: Tensor, weight: Tensor, block: Tensor) -> Any:
        return _spread(torch.mm(grad, weight), torch.mm(grad, block.T)), sums.T @ grad

    def matrix_back(grad: Tensor, sums: Tensor, weight: Tensor, block: Tensor) -> Any:
        grad_x = torch.mm(grad, weight).addmm_(torch.mm(grad, block.T), matrix.T)
        return grad_x, sums.T @ grad

    def one_product_back(grad: Tensor, sums: Tensor, weight: Tensor, block: Tensor) -> Any:
        both = torch.mm(grad, beside.T)
        return _spread(both[:, : -len(block)], both[:, -len(block) :]), sums.T @ grad

    def copying_back(grad: Tensor, sums: Tensor, weight: Tensor, block: Tensor) -> Any:
        both = torch.mm(grad, torch.cat([weight, block.T], 1))
        return _spread(both[:, : -len(block)], both[:, -len(block) :]), sums.T @ grad

    def effective_back(grad: Tensor, sums: Tensor, weight: Tensor, block: Tensor) -> Any:
        effective = (_shards(weight, r) + block.T.unsqueeze(1)).view(weight.shape)
        return torch.mm(grad, effective), sums.T @ grad

    ways = {
        "one node of autograd": (usual, usual_back),
        "both sums by a 0/1 matrix": (by_matrix, matrix_back),
        "X S times W over D, a second W kept": (in_one_product, one_product_back),
        "dY times W beside D^T, W copied each time": (usual, copying_back),
        "dY times W + dW, formed each time": (usual, effective_back),
    }
    steps: dict[str, Callable[[], Tensor]] = {
        BASE: lambda: F.linear(x, weight),
        "disha MiSS": lambda: adapted_linear(x, weight, None, [update]),
    }
    for name, (forward, backward) in ways.items():
        steps[name] = partial(_Node.apply, x, weight, block, forward, backward)
    return steps


class _Node(torch.autograd.Function):
    """(x, W, D, forward, backward) -> y, with one call for each direction."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, block: Tensor, forward: Any, backward: Backward
    ) -> Tensor:
        output, sums = forward(x, weight, block)
        ctx.save_for_backward(sums, weight, block)
        ctx.run_backward = backward
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        grad_x, grad_block = ctx.run_backward(grad, *ctx.saved_tensors)
        return grad_x, None, grad_block, None, None


def _shards(x: Tensor, r: int) -> Tensor:
    return torch.unflatten(x, 1, (-1, r))


def _sum_matrix(x: Tensor, r: int) -> Tensor:
    """Return the 0/1 matrix (in, r) with S(x) = x M."""
    return torch.eye(r, dtype=x.dtype, device=x.device).repeat(x.shape[1] // r, 1)


def _spread(grad_x: Tensor, grad_sums: Tensor) -> Tensor:
    _shards(grad_x, grad_sums.shape[1]).add_(grad_sums.unsqueeze(1))
    return grad_x


def _check(
    steps: Mapping[str, Callable[[], Tensor]], x: Tensor, block: Tensor, cotangent: Tensor
) -> None:
    """Check that every way gives the output and the gradients of disha."""

    def results(name: str) -> tuple[Tensor, ...]:
        output = steps[name]()
        return output, *torch.autograd.grad(output, [x, block], cotangent)

    expected = results("disha MiSS")
    tolerance = 1e-4 if x.dtype == torch.float32 else 4e-2
    for name in steps:
        if name != BASE:
            for one, other in zip(results(name), expected, strict=True):
                largest = float(other.detach().abs().max())
                if float((one - other).detach().abs().max()) > tolerance * largest:
                    raise CandidateError(f"{name} differs from disha's step")
