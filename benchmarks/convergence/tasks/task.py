"""What a task has to offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

__all__ = ["Batch", "Score", "Task", "batch_order"]

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Score:
    """How well a model does on rows that it was not trained on.

    Args:
        loss: mean cross-entropy, in nats.
        exact: share of rows that are right.
    """

    loss: float
    exact: float


class Task(ABC):
    """A pretrained model, rows to adapt it to, and what it should still know afterwards.

    Learning rates are chosen on the validation rows; what is reported is of the test rows.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    about: ClassVar[str]
    """What is learned, from what, in one or two sentences of the report."""
    exact_name: ClassVar[str]
    forgetting_name: ClassVar[str]
    r: ClassVar[int]
    """Bone's; all methods get as many parameters."""
    r_out: ClassVar[int]
    """Of the tile, dividing the output features of every layer."""
    steps: ClassVar[int]
    batch: ClassVar[int]
    evaluate_every: ClassVar[int]
    layers: ClassVar[Mapping[str, str]]
    """Which layers -> a regex over their names; `all` is what is compared."""
    examined: ClassVar[str] = ""
    """A regex over layer names: whose updates are decomposed for their rank."""
    head: ClassVar[str | None] = None
    """The name of a new layer that every method trains besides, or None."""

    @abstractmethod
    def pretrained(self) -> nn.Module:
        """Return the base model, always the same, on the CPU in float32."""

    @abstractmethod
    def training_rows(self) -> Sequence[Any]:
        """Return what `batch_of` makes batches from."""

    @abstractmethod
    def batch_of(self, rows: Sequence[Any], device: torch.device) -> Batch:
        """Return rows as tensors."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss of a batch."""

    @abstractmethod
    def validation_loss(self, model: nn.Module) -> float:
        """Return the mean loss of the validation rows."""

    @abstractmethod
    def test(self, model: nn.Module) -> Score:
        """Return how the model does on the test rows."""

    @abstractmethod
    def forgotten(self, model: nn.Module, base: nn.Module) -> tuple[float, float]:
        """Return what `forgetting_name` says of the base, and of the adapted model."""

    def base(self) -> nn.Module:
        """Return the base model, made once in a process: adapt a copy."""
        return _base(self)


@lru_cache(maxsize=1)
def _base(task: Task) -> nn.Module:
    return task.pretrained().requires_grad_(False).eval()


def batch_order(rows: int, batch: int, steps: int, seed: int) -> list[list[int]]:
    """Return the rows of every step: the same for all methods of one seed.

    Args:
        rows: how many there are; each comes once before any comes again.
        batch: rows in a step.
        steps: how many.
        seed: of the order.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps * batch:
        order.extend(torch.randperm(rows, generator=generator).tolist())
    return [order[step * batch : (step + 1) * batch] for step in range(steps)]
