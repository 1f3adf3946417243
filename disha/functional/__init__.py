"""The mathematics of dimension-sharded adapters, as pure functions of tensors.

All shards of a dimension, runs of r, share one small block D. For a linear layer with weight
W (out, in), input x (..., in) and n = ceil(in / r) input shards, S(x)[j] = sum over b of
x[b r + j] is the shard sum, a tensor (..., r). Sizes that r does not divide are zero-padded to the
next multiple and cropped afterwards. A runtime scale s multiplies the update dW. Everything here is
differentiable by autograd and knows no module.

One file per layer kind, `linear` (Bone, tile and BAT), `conv` and `embedding`; `shards` holds what
they share; `fused` computes linear layers with less memory and time than plain autograd does, and
`products` their own weight's product.
`attention` is what stands between the projections of `nn.MultiheadAttention`.

Source: Kang, "DiSHA: Dimension-Sharding Adaptation of Large Language Models with Fast Convergence
and Fast Computation", arXiv 2409.15371 (Bone was later renamed MiSS; the tile is its "mini").
"""

from disha.functional.attention import additive_mask, attention
from disha.functional.conv import (
    channel_shard_sum,
    conv_delta_weight,
    conv_transpose_delta_weight,
    whole_block,
)
from disha.functional.embedding import embedding_delta, embedding_delta_weight
from disha.functional.linear import (
    adapted_linear,
    bat_delta_weight,
    bat_forward,
    bat_unmerge,
    bone_delta,
    bone_delta_weight,
    bone_forward,
    bone_lora_factors,
    bone_unmerge,
    plain_linear,
    routed_bat_delta,
    routed_bone_delta,
)
from disha.functional.shards import (
    Scale,
    added,
    merged_weight,
    shard_count,
    shard_sum,
    weighted_sum,
    widened_block,
    without_autocast,
)

__all__ = [
    "Scale",
    "adapted_linear",
    "added",
    "additive_mask",
    "attention",
    "bat_delta_weight",
    "bat_forward",
    "bat_unmerge",
    "bone_delta",
    "bone_delta_weight",
    "bone_forward",
    "bone_lora_factors",
    "bone_unmerge",
    "channel_shard_sum",
    "conv_delta_weight",
    "conv_transpose_delta_weight",
    "embedding_delta",
    "embedding_delta_weight",
    "merged_weight",
    "plain_linear",
    "routed_bat_delta",
    "routed_bone_delta",
    "shard_count",
    "shard_sum",
    "weighted_sum",
    "whole_block",
    "widened_block",
    "without_autocast",
]
