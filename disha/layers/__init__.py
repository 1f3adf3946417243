"""Layers with adapters: the blocks, the adapted modules and the registry of layer kinds."""

from disha.layers.adapted import AdaptedLayer, Adapters, Geometry
from disha.layers.blocks import BLOCKS, Bat, Block, Bone
from disha.layers.linear import AdaptedLinear, BatLinear, BoneLinear
from disha.layers.registry import BYPASSED_CHILDREN, LAYER_KINDS, layer_kind_of

__all__ = [
    "BLOCKS",
    "BYPASSED_CHILDREN",
    "LAYER_KINDS",
    "AdaptedLayer",
    "AdaptedLinear",
    "Adapters",
    "Bat",
    "BatLinear",
    "Block",
    "Bone",
    "BoneLinear",
    "Geometry",
    "layer_kind_of",
]
