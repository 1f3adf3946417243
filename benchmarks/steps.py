"""What every benchmark does with an adapted model: fill its blocks, check them, train."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class CandidateError(Exception):
    """A candidate does not compute what it should, so its time would mean nothing."""


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def fill(parameters: Iterable[nn.Parameter], scale: float) -> None:
    """Fill with random values: the same for equal shapes in equal order, so methods compare."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def frozen_stack(layers: int, width: int, device: torch.device) -> nn.Sequential:
    """Return square linear layers without biases, frozen and in evaluation."""
    torch.manual_seed(1)
    stack = (nn.Linear(width, width, bias=False, device=device) for _ in range(layers))
    return nn.Sequential(*stack).requires_grad_(False).eval()


def forward(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Return a call of the model without gradients."""
    model.eval()

    def run() -> Any:
        with torch.no_grad():
            return model(x)

    return run


class TrainingStep:
    """A training step without an optimizer: clear the gradients, forward, backward.

    `cotangent` is the gradient of an output that is not a scalar.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[], Tensor],
        inputs: Iterable[Tensor] = (),
        cotangent: Tensor | None = None,
    ) -> None:
        self.loss, self._leaves = loss, [*trainable(model), *inputs]
        self._cotangent = cotangent

    def clear(self) -> None:
        for leaf in self._leaves:
            leaf.grad = None

    def __call__(self) -> Tensor:
        self.clear()
        loss = self.loss()
        loss.backward(self._cotangent)
        return loss.detach()


def language_loss(model: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    """Return a call that computes a language model's loss on tokens."""
    return lambda: model(input_ids=ids, labels=ids, use_cache=False).loss


def full_step(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Return a complete training step, from forward to optimizer."""

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def require_gradient(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    """As a hook of an embedding: all candidates get the same way back, the frozen base too."""
    return output.requires_grad_()


def check_gradients(name: str, model: nn.Module) -> None:
    """Check after a step that every trained parameter has a gradient."""
    for parameter in trainable(model):
        gradient = parameter.grad
        if gradient is None or not gradient.any() or not torch.isfinite(gradient).all():
            raise CandidateError(f"{name}: a gradient is missing, zero or not finite")
