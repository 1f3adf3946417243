"""The interface of a task."""

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
    """The score of a model on rows that are not in its training set.

    Args:
        loss: mean cross-entropy, in nats.
        exact: share of rows that are right.
    """

    loss: float
    exact: float


class Task(ABC):
    """A task: a pretrained model, rows to train it on, and a test for forgetting.

    Validation rows choose the learning rate; the report uses the test rows.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    about: ClassVar[str]
    """What is learned from what, in one to three sentences of the report."""
    exact_name: ClassVar[str]
    forgetting_name: ClassVar[str]
    r: ClassVar[int]
    """The r of Bone. All methods get as many parameters."""
    r_out: ClassVar[int]
    """The r_out of the tile, which divides the outputs of every layer."""
    steps: ClassVar[int]
    batch: ClassVar[int]
    evaluate_every: ClassVar[int]
    layers: ClassVar[Mapping[str, str]]
    """Name of a set of layers -> a regex of their names. The main comparison uses `all`."""
    head: ClassVar[str | None] = None
    """The name of a new layer that every method trains too, or None."""
    scales: ClassVar[tuple[float, ...]] = ()
    """The runtime scales at which a trained adapter is tested, from 0 to 1; none by default."""

    @abstractmethod
    def pretrained(self) -> nn.Module:
        """Return the base model, always the same, on the CPU."""

    @abstractmethod
    def training_rows(self) -> Sequence[Any]:
        """Return the rows from which `batch_of` makes batches."""

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
        """Return the score on the test rows."""

    @abstractmethod
    def forgotten(self, model: nn.Module, base: nn.Module) -> tuple[float, float]:
        """Return the value of `forgetting_name` for the base and for the adapted model."""

    def base(self) -> nn.Module:
        """Return the base model, which a process makes once. Adapt a copy of it."""
        return _base(self)


@lru_cache(maxsize=1)
def _base(task: Task) -> nn.Module:
    return task.pretrained().requires_grad_(False).eval()


def batch_order(rows: int, batch: int, steps: int, seed: int) -> list[list[int]]:
    """Return the rows of every step, which depend only on the seed."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps * batch:
        order.extend(torch.randperm(rows, generator=generator).tolist())
    return [order[step * batch : (step + 1) * batch] for step in range(steps)]
