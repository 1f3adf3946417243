"""The plan of an injection: what it would do to a model. `print(plan)` shows it as a table.

A plan comes from a target (`target_plans`) or from a file (`file_plans`), and `inject` carries it
out. Making a plan changes nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from disha.config import AdapterConfig
from disha.functional import Geometry, Method, method_of
from disha.functional.new_rows import ROWS
from disha.layers.blocks import Slot
from disha.layers.weights import read_weight, weight_shape
from disha.sharding.zero import whole_shape
from disha.text import counted, join, table

Place = tuple[Any, str]
"""A module, and its attribute that holds a parameter."""


@dataclass(frozen=True)
class PlannedLayer:
    """A weight, or a module without one, and its planned block or the reason for none."""

    module: nn.Module = field(repr=False)
    module_names: tuple[str, ...]  # its names in the model; a shared module has several
    config: AdapterConfig
    attribute: str = ""  # the weight's name in the module; empty if it has none
    slot: Slot | None = None  # None if the layout is unknown
    is_new_rows: bool = False  # whether its block has new rows, and none of a method
    r: int = 0
    # The values of its block; None if `init` makes them.
    values: Tensor | None = field(default=None, repr=False, compare=False)
    reason: str | None = None  # why it is not adapted; None if it is
    # The other places of its parameter, whose modules read the update too: name -> place.
    tied: Mapping[str, Place] = field(default_factory=dict, compare=False)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Its names in targets and files; a `weight` has the names of its module."""
        # The name of a slot is empty for `weight`; without a slot, the attribute is all there is.
        below = self.attribute if self.slot is None else self.slot.name
        return tuple(join(name, below) for name in self.module_names)

    @property
    def name(self) -> str:
        """Its main name; empty if the module is the model itself."""
        return self.names[0]

    @property
    def place(self) -> Place:
        """The module and the attribute that hold its parameter."""
        return self.module, self.attribute

    @property
    def full_name(self) -> str:
        """The main name of its parameter, with the attribute, also if that is `weight`."""
        return join(self.module_names[0], self.attribute)

    @property
    def names_to_match(self) -> tuple[str, ...]:
        """Its names in `layouts` and `rows`, where a module's name means its `weight`."""
        names = list(self.names)
        if self.attribute == "weight":
            names += self.module_names
        names += [join(name, self.attribute) for name in self.module_names]
        return tuple(names)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, with all of its rows."""
        if self.slot is None:
            return tuple(whole_shape(read_weight(self.module, self.attribute)))
        return weight_shape(self.module, self.slot)

    @cached_property
    def geometry(self) -> Geometry:
        """The sizes of the adapted rows."""
        assert self.slot is not None
        return self.slot.layout.geometry(self.shape, self.slot.output_ranges)

    @property
    def in_features(self) -> int:
        """Size of its input."""
        return self.geometry.in_features

    @property
    def out_features(self) -> int:
        """Size of its output, or the number of its adapted rows."""
        return self.geometry.out_features

    @cached_property
    def method(self) -> Method:
        """The method of its block."""
        return ROWS if self.is_new_rows else method_of(self.config.method)

    @property
    def block_shape(self) -> tuple[int, ...]:
        """The shape of its block."""
        slot = self.slot
        assert slot is not None
        return self.method.block_shape(
            slot.layout, self.shape, self.r, self.config.r_out, slot.output_ranges
        )

    @property
    def parameters(self) -> int:
        """Number of values in its block."""
        return math.prod(self.block_shape)

    @property
    def remedy(self) -> str:
        """An argument that would declare its layout. Only the user knows which layout is right."""
        example = {2: "out in", 3: "expert out in"}.get(len(self.shape), "out in *kernel")
        layouts = {f"^{re.escape(self.name)}$": example}
        return f"layouts={layouts}"


RATE_FACTOR = 0.9
"""Of the best rates in the study: 50 of 84 are within a factor of 1.5 of `Plan.rate`."""

EXCLUDED = "excluded"
"""The reason of what `exclude` leaves out."""


@dataclass(frozen=True)
class Plan:
    """What an injection would do; `print(plan)` shows it as a table.

    Attributes:
        adapter: the adapter's name.
        config: its configuration.
        freeze: whether all other parameters are frozen.
        layers: the weights that would be adapted.
        also_train: clean names of the parameters to be trained and saved with the adapter, and of
            the buffers to be saved with it once they have changed.
        skipped: what the target selects but would not be adapted, each with its `reason`.
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
    layers: tuple[PlannedLayer, ...]
    also_train: tuple[str, ...]
    skipped: tuple[PlannedLayer, ...] = ()
    unknown: tuple[PlannedLayer, ...] = ()
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
        layers = [layer for layer in self.layers if not layer.is_new_rows]  # these have no dW
        steps = [layer.method.step(layer.in_features, layer.r) for layer in layers]
        return RATE_FACTOR * math.sqrt(len(steps)) / sum(steps) if steps else math.nan

    @property
    def percent(self) -> float:
        """Trainable parameters as a percentage of all."""
        return 100.0 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        rows = [
            (
                layer.name or "(the model)",
                "new rows" if layer.is_new_rows else layer.config.method,
                layer.r,
                f"{layer.in_features} -> {layer.out_features}",
                f"{layer.parameters:,}",
            )
            for layer in self.layers
        ]
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
