"""The plan of an injection: what it would do to a model. `print(plan)` shows it as a table.

A plan comes from a target (`inject`) or from a file (`file_plans`), and `inject.apply_plan` carries
it out. Making a plan changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from disha.config import AdapterConfig
from disha.layers.spec import BlockSpec
from disha.text import counted, table


class Skipped(NamedTuple):
    """What a target selects, but an injection would leave as it is."""

    name: str
    reason: str
    has_weight: bool  # whether it is a weight, and not a module without one


RATE_FACTOR = 0.9
"""Of the best rates in the study: 50 of 84 are within a factor of 1.5 of `Plan.rate`."""


@dataclass(frozen=True)
class Plan:
    """What an injection would do; `print(plan)` shows it as a table.

    Attributes:
        adapter: the adapter's name.
        config: its configuration.
        freeze: whether all other parameters are frozen.
        layers: the weights that would be adapted, and their blocks.
        also_train: clean names of the parameters to be trained and saved with the adapter, and of
            the buffers to be saved with it once they have changed.
        skipped: what the target selects but would not be adapted, each with its name and the
            reason.
        unknown: the matrix parameters of the model whose layouts are unknown.
        trainable: number of parameters in the model that would require gradients afterwards.
        total: number of parameters of the model afterwards, blocks included. A quantised weight
            counts as a dense one.

    Examples:
        >>> from torch import nn
        >>> import disha
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4), nn.LayerNorm(4))
        >>> plan = disha.plan_adapters(model, "0|2", r=4)
        >>> [(layer.name, layer.in_features, layer.parameters) for layer in plan.layers]
        [('0', 8, 64)]
        >>> [(module.name, module.reason) for module in plan.skipped]
        [('2', 'no layer kind adapts LayerNorm')]
        >>> plan.added, plan.trainable, plan.total
        (64, 64, 284)
    """

    adapter: str
    config: AdapterConfig
    freeze: bool
    layers: tuple[BlockSpec, ...]
    also_train: tuple[str, ...]
    skipped: tuple[Skipped, ...] = ()
    unknown: tuple[BlockSpec, ...] = ()
    trainable: int = 0
    total: int = 0

    @property
    def tied(self) -> tuple[tuple[str, ...], ...]:
        """The names of each adapted parameter that several modules share.

        Under each of these names, the update is read; `exclude` has left out the others.
        """
        return tuple((layer.full_name, *layer.tied) for layer in self.layers if layer.tied)

    @property
    def added(self) -> int:
        """Number of parameters in the new blocks."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def rate(self) -> float:
        """A learning rate for AdamW, by the sizes of the layers; `suggest_rate` measures one.

        Each layer moves its outputs by `step` x rate in a step, and the steps of L layers add up
        as random ones do. So the rate is RATE_FACTOR / (sqrt(L) x mean step). Rows of
        `also_train_rows` do not count. If no layer would be adapted, it is nan.
        """
        updates = [spec for spec in self.layers if not spec.is_new_rows]  # rows have no dW
        steps = [spec.method_of_block.step(spec.in_features, spec.r) for spec in updates]
        return RATE_FACTOR * math.sqrt(len(steps)) / sum(steps) if steps else math.nan

    @property
    def percent(self) -> float:
        """Trainable parameters as a percentage of all."""
        return 100.0 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        rows = [spec.row for spec in self.layers]
        lines = [table(("layer", "method", "r", "in -> out", "parameters"), rows)]
        lines += [f"skipped {layer.name}: {layer.reason}" for layer in self.skipped]
        lines += [
            f"not adapted {layer.name} {layer.shape}: declare its layout, such as {layer.remedy}"
            for layer in self.unknown
        ]
        lines += [f"one shared parameter: {', '.join(names)}" for names in self.tied]
        if self.also_train:
            lines.append(f"also trained: {', '.join(self.also_train)}")
        lines.append(
            f"adapter {self.adapter!r}: {counted(len(self.layers), 'layer')}, "
            f"{counted(self.added, 'parameter')}; "
            f"trainable {self.trainable:,} of {self.total:,} ({self.percent:.3f}%)"
        )
        return "\n".join(lines)
