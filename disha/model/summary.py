"""summary(model): what is adapted, and how much of the model trains."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from disha.layers.weights import count_values
from disha.model.view import ModelView
from disha.text import table


@dataclass(frozen=True)
class LayerSummary:
    """One block of one layer."""

    name: str  # the layer's name in the model
    adapter: str
    method: str
    r: int
    r_out: int | None  # of a tile
    parameters: int  # number of values in the block
    scale: float
    active: bool


@dataclass(frozen=True)
class Summary:
    """The adapted layers and the numbers of parameters of a model; printable.

    Attributes:
        trainable: number of parameters that require gradients.
        total: number of all parameters, each counted once. A quantised weight counts as a dense
            one.
        layers: one `LayerSummary` per block.

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
    layers: tuple[LayerSummary, ...]

    @property
    def percent(self) -> float:
        """Trainable parameters as a percentage of all."""
        return 100.0 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        head = f"trainable {self.trainable:,} of {self.total:,} parameters ({self.percent:.3f}%)"
        rows = [
            (
                row.name or "(the model)",
                row.adapter,
                row.method,
                row.r,
                f"{row.parameters:,}",
                f"{row.scale:g}",
                "yes" if row.active else "no",
            )
            for row in self.layers
        ]
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
    layers = []
    for name, layer, adapter, block in view.blocks():
        method = "new rows" if block.is_new_rows else block.method.name
        row = LayerSummary(
            name=name,
            adapter=adapter,
            method=method,
            r=block.r,
            r_out=block.r_out,
            parameters=count_values(block.block),
            scale=block.scale,
            active=adapter in layer.disha.active,
        )
        layers.append(row)
    trainable, total = view.count_parameters(lambda parameter: parameter.value.requires_grad)
    return Summary(trainable, total, tuple(layers))
