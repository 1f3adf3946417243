"""Which adapters samples can be routed to. It is found once, when an adapter is added."""

from __future__ import annotations

from torch import nn

from disha.model.view import ModelView


def reason_against_routing(view: ModelView, adapter: str) -> str | None:
    """Return why samples can't be routed to an adapter, or None if they can."""
    for name, _, _, block in view.blocks(adapter):
        if "expert" in block.spec.layout.axes:
            return (
                f"route_adapters can't route samples through {name}, because experts get the "
                "tokens of all samples in any order; leave experts out (exclude=)"
            )
    attention = [module for module in view.names if isinstance(module, nn.MultiheadAttention)]
    sequence_first = [view.names[module][0] for module in attention if not module.batch_first]
    inside = {child for module in attention for child in module.modules()}
    outside = [
        name
        for layer, name in view.find_layers().items()
        if layer not in inside and adapter in layer.disha
    ]
    if not sequence_first or not outside:
        return None
    return (
        f"route_adapters needs samples along the leading dimension, but {sequence_first[0]} has "
        f"batch_first=False, so other layers, such as {outside[0]}, may get sequences first. Build "
        "the model with batch_first=True, or adapt attention projections only"
    )
