"""An adapted layer whose weight the tests of effective weights read."""

import disha


def adapted_weight():
    """Return a layer of 4 inputs and 3 outputs, and its effective weight."""
    layer = disha.BoneLinear(4, 3, r=2, init="kaiming")
    return layer, layer.weight
