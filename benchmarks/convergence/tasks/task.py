"""The interface of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

IGNORED = -100
"""The label of tokens that the loss leaves out."""
AT_ONCE = 32


class Rows(NamedTuple):
    """Rows of different content, always the same."""

    training: Sequence[Any]
    validation: Sequence[Any]
    test: Sequence[Any]


class Task(ABC):
    """A task: a pretrained model, rows to train it on, and a test for forgetting.

    Validation rows choose the learning rate; the report uses the test rows.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    r: ClassVar[int]
    """The r of Bone. All methods get as many parameters."""
    r_out: ClassVar[int]
    """The r_out of the tile, which divides the outputs of every layer."""
    steps: ClassVar[int]
    batch: ClassVar[int]
    evaluate_every: ClassVar[int]
    rates: ClassVar[tuple[float, ...]]
    """The learning rates with which the search of each method begins."""
    layers: ClassVar[Mapping[str, str]]
    """Name of a set of layers -> a regex of their names. The main comparison uses `all`."""
    head: ClassVar[str | None] = None
    """The name of a new layer that every method trains too, or None."""
    scales: ClassVar[tuple[float, ...]] = ()
    """The runtime scales at which a trained adapter is tested, from 0 to 1; none by default."""
    rows: Rows

    @abstractmethod
    def pretrained(self) -> nn.Module:
        """Return the base model, always the same."""

    @abstractmethod
    def batch_of(self, rows: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Return inputs and labels."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean cross-entropy of the labels, in nats."""

    @abstractmethod
    def forgotten(self, model: nn.Module, base: nn.Module) -> tuple[float, float]:
        """Return what the base could do, for the base and the adapted model; lower is better."""

    def score(self, model: nn.Module, rows: Sequence[Any]) -> float:
        """Return the mean loss of rows that are not in the training set."""
        summed = counted = 0.0
        rows = sorted(rows, key=lambda row: len(row[0]))  # little time goes into padding
        with torch.inference_mode():
            for start in range(0, len(rows), AT_ONCE):
                batch = self.batch_of(rows[start : start + AT_ONCE])
                labels = int((batch[1] != IGNORED).sum())
                summed += labels * float(self.loss(model, batch))
                counted += labels
        return summed / counted

    def base(self) -> nn.Module:
        """Return the base model, which a process makes once. Adapt a copy of it."""
        return _base(self)


@lru_cache(maxsize=1)
def _base(task: Task) -> nn.Module:
    return task.pretrained().requires_grad_(False).eval()


def held_out(rows: Sequence[Any], validation: int, test: int) -> Rows:
    """Split rows; the first are held out."""
    return Rows(rows[validation + test :], rows[:validation], rows[validation : validation + test])


def batch_order(rows: int, batch: int, steps: int, seed: int) -> list[list[int]]:
    """Return the rows of every step, which depend only on the seed."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps * batch:
        order.extend(torch.randperm(rows, generator=generator).tolist())
    return [order[step * batch : (step + 1) * batch] for step in range(steps)]
