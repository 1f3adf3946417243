"""Bone and tile: all shards of the inputs share one block D, so that dW x = S(x) D.

- Bone, block D (r, out): dW[o, i] = D[i mod r, o];
- tile, block D (r, r_out) where r_out divides out: dW[o, i] = D[i mod r, o mod r_out].

Bone is exactly a LoRA of rank r with alpha = r: A = [I_r I_r ... I_r] cropped to (r, in), B = D^T.
For the backward pass, autograd saves S(x) (tokens x r) and never x.

Source: arXiv 2409.15371, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from disha.functional.layouts import Geometry
from disha.functional.method import Groups, Method
from disha.functional.shard_groups import find_groups, method_with_groups
from disha.functional.shard_sums import tiled


class _Bone(Method):
    name = "bone"
    aliases = ("miss",)  # its name in later versions of the paper
    low_rank = True
    tiles = True
    additive = True

    def find(self, name: object) -> Method | None:
        return super().find(name) or find_groups(name)

    def shape(self, geometry: Geometry, r: int, r_out: int | None) -> tuple[int, ...]:
        return (*geometry.stack, r, geometry.out_features if r_out is None else r_out)

    def of_outputs(self, block: Tensor, start: int, stop: int, geometry: Geometry) -> Tensor | None:
        return tiled(block, geometry.out_features)[..., start:stop]

    def of_inputs(self, block: Tensor, start: int, stop: int, geometry: Geometry) -> Tensor | None:
        offset = start % block.shape[-2]
        return block.roll(-offset, -2) if offset else block  # D'[j] = D[(start + j) mod r]

    def widen(self, block: Tensor, geometry: Geometry, r: int, wider: int) -> Tensor | None:
        return None if wider % r else torch.cat([block] * (wider // r), -2)  # D'[j] = D[j mod r]

    def from_factors(self, a: Tensor, b: Tensor, r: int) -> Tensor | None:
        return b.mT.contiguous() if b.shape[-1] == r else None

    def with_groups(self, groups: Groups) -> Method | None:
        return self if groups == 1 else method_with_groups(groups)


BONE = _Bone()
