"""Which layer kind adapts which class, and which modules never get called."""

from __future__ import annotations

from torch import nn

from disha.layers.adapted import AdaptedLayer
from disha.layers.linear import AdaptedLinear

__all__ = ["BYPASSED_CHILDREN", "LAYER_KINDS", "layer_kind_of"]

LAYER_KINDS: dict[type[nn.Module], type[AdaptedLayer]] = {
    kind.base_class: kind for kind in (AdaptedLinear,)
}

BYPASSED_CHILDREN: dict[type[nn.Module], tuple[str, ...]] = {
    nn.MultiheadAttention: ("out_proj",),
    nn.TransformerEncoderLayer: ("linear1", "linear2"),
}
"""Children whose weight the owner reads, always or on its fused path, without calling them: an
adapter there would have no effect."""


def layer_kind_of(module: nn.Module) -> type[AdaptedLayer] | None:
    """Return the layer kind that adapts `module`, or None where there is none."""
    if isinstance(module, AdaptedLayer):
        return type(module).layer_kind
    for cls in type(module).__mro__:
        if cls in LAYER_KINDS:
            return LAYER_KINDS[cls]
    return None
