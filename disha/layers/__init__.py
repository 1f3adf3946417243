"""Layers with adapters: blocks, adapted classes, the table of kinds, and opaque weights."""

from disha.layers.adapted import AdaptedLayer, AdaptedLinear, AdaptedWeight, Adapters
from disha.layers.blocks import Block, Slot, block_name
from disha.layers.kinds import LAYER_KINDS, declared_slots, register_layer_kind
from disha.layers.linear import BatLinear, BoneLinear

__all__ = [
    "LAYER_KINDS",
    "AdaptedLayer",
    "AdaptedLinear",
    "AdaptedWeight",
    "Adapters",
    "BatLinear",
    "Block",
    "BoneLinear",
    "Slot",
    "block_name",
    "declared_slots",
    "register_layer_kind",
]
