"""Layers with adapters: the blocks, the adapted modules and the registry of layer kinds."""

from disha.layers.adapted import AdaptedLayer, Adapters, Geometry
from disha.layers.blocks import BLOCKS, Bat, Block, Bone
from disha.layers.embedding import AdaptedEmbedding
from disha.layers.linear import (
    AdaptedLinear,
    AdaptedTransposedLinear,
    BatLinear,
    BoneLinear,
)
from disha.layers.registry import (
    LAYER_KINDS,
    layer_kind_of,
    register_layer_kind,
)

__all__ = [
    "BLOCKS",
    "LAYER_KINDS",
    "AdaptedEmbedding",
    "AdaptedLayer",
    "AdaptedLinear",
    "AdaptedTransposedLinear",
    "Adapters",
    "Bat",
    "BatLinear",
    "Block",
    "Bone",
    "BoneLinear",
    "Geometry",
    "layer_kind_of",
    "register_layer_kind",
]
