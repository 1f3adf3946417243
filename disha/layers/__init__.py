"""Layers with adapters.

- `spec`: a weight and its block, described once; `kinds` declares those of known layers
- `blocks`, `new_blocks`: a block; `adapters`: those of a layer, and its state as a value
- `memory`: the state of a model, and where its modules are
- `adapted`: the classes that modules move to, and `set_state`, the only change of a layer
- `weight_property`, `weights`: how an adapted weight is read; `quantized`, `bitsandbytes`
- `linear`: `BoneLinear` and `BatLinear`
"""

from disha.layers.adapted import AdaptedLayer
from disha.layers.kinds import register_layer_kind
from disha.layers.linear import BatLinear, BoneLinear
from disha.layers.spec import BlockSpec

__all__ = ["AdaptedLayer", "BatLinear", "BlockSpec", "BoneLinear", "register_layer_kind"]
