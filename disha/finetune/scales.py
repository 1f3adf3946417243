"""Measures what a model has learned and what it has forgotten, at several scales of its adapter.

At scale 0 the model is the base, and at scale 1 it is as trained. Any other scale multiplies the
update. Parameters that were saved with the blocks act at every scale. `disha evaluate --scales`
measures the model at each scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

import disha
from disha.finetune.errors import SettingsError

__all__ = ["AtScale", "at_scales", "best_scale"]


@dataclass(frozen=True)
class AtScale:
    """The losses of a model at one scale of its adapter.

    Args:
        scale: factor on the update; 1 as trained.
        loss: on the rows of the task.
        retained: on the rows that the model should stay good at; None without such rows.
    """

    scale: float
    loss: float
    retained: float | None

    @property
    def total(self) -> float:
        """The sum of both losses."""
        return self.loss + (self.retained or 0.0)


def at_scales(
    model: nn.Module,
    scales: Sequence[float],
    loss: Callable[[], float],
    retained: Callable[[], float] | None,
) -> Iterator[AtScale]:
    """Measure a model at each scale of its adapter. At the end, the adapter has its own scale.

    Args:
        model: a model with the adapter, which is not merged.
        scales: factors on the update.
        loss: measures the model on the rows of the task.
        retained: measures it on the rows that it should stay good at; None without such rows.

    Raises:
        SettingsError: the adapter has several scales.
    """
    own = {layer.scale for layer in disha.summary(model).layers}
    if len(own) > 1:
        raise SettingsError(
            f"--scales multiplies the scale of the adapter, but its layers have {len(own)} "
            "different scales; leave --scales out"
        )
    (whole,) = own
    try:
        for scale in scales:
            disha.set_adapter_scale(model, scale * whole)
            yield AtScale(scale, loss(), None if retained is None else retained())
    finally:
        disha.set_adapter_scale(model, whole)


def best_scale(found: Sequence[AtScale]) -> AtScale:
    """Return the losses with the lowest sum. Of equal ones, return those of the lowest scale.

    A sum that is not a number, as of a scale that overflows, is the highest.
    """
    return min(found, key=lambda one: (math.isnan(one.total), one.total, one.scale))
