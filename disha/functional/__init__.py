"""The mathematics of dimension-sharded adapters, as pure functions of tensors.

A weight is a stack of matrices W (out, in). The inputs are cut into shards, runs of r, and all
shards share one small trainable block D. The shard sum of an input x (..., in) is a tensor
(..., r): S(x)[j] = sum over b of x[b r + j]. Sizes that r does not divide are zero-padded and
cropped afterwards. A runtime scale s multiplies the update dW. As in `F.linear`, the inputs
are the last dimension of x, and W x stands for x W^T. All functions are differentiable, and none
takes a module.

From a layer to its update: the layer makes an `Update` of each acting block, and the `Updates` of
a weight have them all. A product enters through `Updates.linear` or `Updates.product`, which call
`linear` or `products`. These ask the block's `Method` for dW, or for its factors A and R with
dW x = R^T (A x). `Layout` tells the method which axes of a weight are its matrices.

Read in this order: `shard_sums`, `layouts`, `method`, its subclasses in `shard_groups`, `bone`,
`lora` and `bat`, `methods` (the table), `update` (one block), `low_rank` and `products` (any
layout; with `dropout`, `convolutions` and `lookups`), then its special cases `linear` and `stacks`,
then `parts` and `new_rows`; last `weight_updates`, `row_products` and `routed` (all blocks of a
weight).

Source: Kang, "DiSHA: Dimension-Sharding Adaptation of Large Language Models with Fast Convergence
and Fast Computation", arXiv 2409.15371 (Bone was later renamed MiSS; the tile is its "mini").
"""

from disha.functional.layouts import (
    PATTERNS,
    Geometry,
    Layout,
    layout_of,
)
from disha.functional.linear import adapted_linear
from disha.functional.method import METHODS, Method, method_names, method_of
from disha.functional.methods import register_method
from disha.functional.products import adapted_product
from disha.functional.shard_sums import merged_weight, shard_count, shard_sum, weighted_sum
from disha.functional.stacks import adapted_grouped, adapted_stack
from disha.functional.update import Update, computed_weight

__all__ = [
    "METHODS",
    "PATTERNS",
    "Geometry",
    "Layout",
    "Method",
    "Update",
    "adapted_grouped",
    "adapted_linear",
    "adapted_product",
    "adapted_stack",
    "computed_weight",
    "layout_of",
    "merged_weight",
    "method_names",
    "method_of",
    "register_method",
    "shard_count",
    "shard_sum",
    "weighted_sum",
]
