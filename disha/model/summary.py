"""summary(model): what is adapted, and how much of the model trains."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from disha.layers.spec import BlockSpec
from disha.model.view import ModelView
from disha.text import table


@dataclass(frozen=True)
class Summary:
    """The adapted layers and the numbers of parameters of a model; printable.

    Attributes:
        trainable: number of parameters that require gradients.
        total: number of all parameters, each counted once. A quantised weight counts as a dense
            one.
        layers: the spec of each block, with the scale of now.
        active: the blocks that act: the names of their adapters and of their weights.

    Examples:
        >>> import disha
        >>> summary = disha.summary(disha.BoneLinear(8, 16, r=4))
        >>> summary.trainable, summary.total, round(summary.percent, 1)
        (64, 208, 30.8)
        >>> summary.layers[0].adapter, summary.layers[0].parameters
        ('default', 64)
    """

    trainable: int
    total: int
    layers: tuple[BlockSpec, ...]
    active: frozenset[tuple[str, str]]

    @property
    def percent(self) -> float:
        """Trainable parameters as a percentage of all."""
        return 100.0 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        head = f"trainable {self.trainable:,} of {self.total:,} parameters ({self.percent:.3f}%)"
        rows = []
        for spec in self.layers:
            name, method, r, _, parameters = spec.row
            acts = "yes" if (spec.adapter, spec.name) in self.active else "no"
            rows.append((name, spec.adapter, method, r, parameters, f"{spec.scale:g}", acts))
        if not rows:
            return f"{head}\nno adapters"
        header = ("layer", "adapter", "method", "r", "parameters", "scale", "active")
        return f"{table(header, rows)}\n{head}"


def summary(model: nn.Module) -> Summary:
    """Return what is adapted in a model and how much of it trains; printable.

    Args:
        model: any model.

    Raises:
        ArgumentTypeError: the model is not an `nn.Module`.

    Examples:
        >>> from torch import nn
        >>> import disha
        >>> model = disha.inject_adapters(nn.Sequential(nn.Linear(8, 16)), "0", r=4)
        >>> print(disha.summary(model))
        layer  adapter  method  r  parameters  scale  active
        0      default  bone    4          64      1  yes
        trainable 64 of 208 parameters (30.769%)
    """
    view = ModelView(model)
    blocks = view.blocks()
    layers = tuple(model_block.spec for model_block in blocks)
    active = frozenset(
        (adapter, name) for name, layer, adapter, _ in blocks if adapter in layer.disha.active
    )
    trainable, total = view.count_parameters(lambda parameter: parameter.value.requires_grad)
    return Summary(trainable, total, layers, active)
