"""The mathematics of dimension-sharded adapters, as pure functions of tensors.

A weight is a stack of matrices W (out, in); all shards of its inputs, runs of r, share one small
trainable block D. S(x)[j] = sum over b of x[b r + j] is the shard sum of an input x (..., in), a
tensor (..., r). Sizes that r does not divide are zero-padded and cropped afterwards. A runtime
scale s multiplies the update dW. Everything here is differentiable and knows no module.

Read in this order: `shards` cuts dimensions, `layouts` says where a weight keeps its matrices,
`linear` and `embedding` have the formulas, `methods` is the table of methods and layouts, `updates`
has the products of an input with a weight and its updates. `fused` computes one matrix with less
memory and time than plain autograd does.

Source: Kang, "DiSHA: Dimension-Sharding Adaptation of Large Language Models with Fast Convergence
and Fast Computation", arXiv 2409.15371 (Bone was later renamed MiSS; the tile is its "mini").
"""

from disha.functional.embedding import embedding_delta
from disha.functional.layouts import (
    PATTERNS,
    Geometry,
    Layout,
    Rows,
    layout_of,
    place_rows,
    take_rows,
)
from disha.functional.linear import (
    bat_delta_weight,
    bat_forward,
    bat_stack,
    bone_delta,
    bone_delta_weight,
    bone_forward,
    bone_lora_factors,
    routed_bone_delta,
)
from disha.functional.methods import (
    METHODS,
    Method,
    block_shape,
    delta_weight,
    kept_block,
    lora_factors,
    matrix_block,
    method_of,
    misfit,
    stack_of,
    widened,
)
from disha.functional.shards import (
    Scale,
    added,
    merged_weight,
    shard_count,
    shard_sum,
    weighted_sum,
    without_autocast,
)
from disha.functional.updates import (
    Update,
    adapted_conv,
    adapted_grouped,
    adapted_linear,
    adapted_lookup,
    adapted_stack,
    conv_update,
    effective_weight,
    linear_update,
    lookup_update,
    over_all_rows,
)

__all__ = [
    "METHODS",
    "PATTERNS",
    "Geometry",
    "Layout",
    "Method",
    "Rows",
    "Scale",
    "Update",
    "adapted_conv",
    "adapted_grouped",
    "adapted_linear",
    "adapted_lookup",
    "adapted_stack",
    "added",
    "bat_delta_weight",
    "bat_forward",
    "bat_stack",
    "block_shape",
    "bone_delta",
    "bone_delta_weight",
    "bone_forward",
    "bone_lora_factors",
    "conv_update",
    "delta_weight",
    "effective_weight",
    "embedding_delta",
    "kept_block",
    "layout_of",
    "linear_update",
    "lookup_update",
    "lora_factors",
    "matrix_block",
    "merged_weight",
    "method_of",
    "misfit",
    "over_all_rows",
    "place_rows",
    "routed_bone_delta",
    "shard_count",
    "shard_sum",
    "stack_of",
    "take_rows",
    "weighted_sum",
    "widened",
    "without_autocast",
]
