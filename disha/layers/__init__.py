"""Layers with adapters: blocks, adapted classes, layer kinds, and quantised weights."""

from disha.layers.adapted import AdaptedLayer
from disha.layers.kinds import register_layer_kind
from disha.layers.linear import BatLinear, BoneLinear
from disha.layers.spec import BlockSpec

__all__ = ["AdaptedLayer", "BatLinear", "BlockSpec", "BoneLinear", "register_layer_kind"]
