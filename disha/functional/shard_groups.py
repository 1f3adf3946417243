"""Groups of shards: an output sees the shards of its own group, and not all of them.

With g groups, shard b is in group b mod g, and output o in group o mod g:

    dW[o, i] = D[i mod r, o]   if (i // r) mod g = o mod g,   else 0

The block D (r, out) is that of Bone, and so is the number of multiplications, but the rank of dW
rises to g r. With one group, it is Bone. Written with shard sums, dW x = S(x) R, where S(x) has the
size g r and R has zeros:

    R[k r + j, o] = D[j, o]    if o mod g = k,                else 0

`multiply_by_groups` multiplies no zeros: for each group k, it multiplies the part k of S(x) by the
columns of D of the outputs in group k. If each group has one shard, S(x) is x. For the backward
pass, autograd saves S(x) and D.
"""

from __future__ import annotations

import re
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from disha.functional.layouts import Geometry
from disha.functional.method import ALL_GROUPS, Down, Groups, Method
from disha.functional.shard_sums import (
    add_to,
    pad_to_multiple,
    scaled,
    shard_count,
    size_of_sum,
)


class _BoneGroups(Method):
    low_rank = True
    compact = True  # R has zeros
    additive = True

    def __init__(self, name: str, groups: int | None) -> None:
        self.name = name
        self.groups = groups  # None for as many as possible

    @property
    def block_name(self) -> str:
        return "bone_block"

    def shape(self, geometry: Geometry, r: int, r_out: int | None) -> tuple[int, ...]:
        return (*geometry.stack, r, geometry.out_features)

    def factors(self, block: Tensor, geometry: Geometry) -> tuple[Down, Tensor]:
        return int(self._count(block, geometry.in_features) * block.shape[-2]), block

    def dense_up(self, up: Tensor, geometry: Geometry) -> Tensor:
        return group_factor(up, self._count(up, geometry.in_features))

    def multiply_up(
        self,
        sums: Tensor,
        up: Tensor,
        geometry: Geometry,
        scale: float = 1.0,
        output: Tensor | None = None,
    ) -> Tensor:
        return multiply_by_groups(sums, up, scale, output)

    def step(self, inputs: int, r: int) -> float:
        shards = shard_count(inputs, r)
        return r * size_of_sum(shards / min(self.groups or shards, shards))

    def look_up(self, indices: Tensor, block: Tensor, geometry: Geometry) -> Tensor:
        return group_lookup(indices, block, self._count(block, geometry.in_features))

    def of_outputs(self, block: Tensor, start: int, stop: int, geometry: Geometry) -> Tensor | None:
        part = block[..., start:stop]
        groups = self._count(block, geometry.in_features)
        keeps_groups = start % groups == 0 and self._count(part, geometry.in_features) == groups
        return part if keeps_groups else None

    def of_inputs(self, block: Tensor, start: int, stop: int, geometry: Geometry) -> Tensor | None:
        groups = self._count(block, geometry.in_features)
        size = groups * block.shape[-2]
        keeps_groups = start % size == 0 and self._count(block, stop - start) == groups
        return block if keeps_groups else None

    def from_factors(self, a: Tensor, b: Tensor, r: int) -> Tensor | None:
        groups, rest = divmod(b.shape[-1], r)
        if rest or not b.any():  # any number of groups has zeros
            return None
        outputs = torch.arange(b.shape[-2], device=b.device)
        parts = torch.unflatten(b, -1, (groups, r))  # (..., out, g, r)
        return parts[..., outputs, outputs % groups, :].mT.contiguous()

    def _count(self, block: Tensor, in_features: int) -> int:
        return group_count(self.groups, in_features, block)


_PREFIX = "bone_groups"
_NAME = re.compile(rf"{_PREFIX}(_all|[2-9]|[1-9][0-9]+)")
"""The names of Bone with groups of shards."""


def method_with_groups(groups: Groups) -> Method | None:
    """Return Bone with this number of groups of shards."""
    suffix = "_all" if groups == ALL_GROUPS else str(groups)
    return find_groups(f"{_PREFIX}{suffix}")


def find_groups(name: object) -> Method | None:
    """Return Bone with the groups of shards that a name tells, or None."""
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        return None
    return _make(name)


@cache  # so that a name always means the same object
def _make(name: str) -> Method:
    number = name.removeprefix(_PREFIX)
    return _BoneGroups(name, groups=None if number == "_all" else int(number))


def group_count(asked: int | None, in_features: int, block: Tensor) -> int:
    """Return the number of groups that a weight has if so many are asked for: None for all.

    With more groups than shards, some outputs would see no shard. With more groups than outputs,
    some shards would be seen by no output.
    """
    r, out_features = block.shape[-2:]
    largest = min(shard_count(in_features, r), out_features)
    return largest if asked is None else min(asked, largest)


def group_factor(block: Tensor, groups: int) -> Tensor:
    """Return R (..., g r, out) of a block D (..., r, out)."""
    if groups == 1:
        return block
    group = torch.arange(groups, device=block.device)
    sees = _groups_of_outputs(block, groups) == group[:, None, None]  # (g, 1, out)
    return torch.where(sees, block.unsqueeze(-3), 0.0).flatten(-3, -2)


def group_lookup(indices: Tensor, block: Tensor, groups: int) -> Tensor:
    """Return the columns of dW that indices choose, as (..., out), without R."""
    r = block.shape[0]
    group_of_index = indices // r % groups
    sees = _groups_of_outputs(block, groups) == group_of_index.unsqueeze(-1)  # (..., out)
    return torch.where(sees, F.embedding(indices % r, block), 0.0)


def _groups_of_outputs(block: Tensor, groups: int) -> Tensor:
    """Return the number of the group of each output of a block (..., r, out)."""
    return torch.arange(block.shape[-1], device=block.device) % groups


def multiply_by_groups(
    sums: Tensor, block: Tensor, scale: float = 1.0, output: Tensor | None = None
) -> Tensor:
    """Return s S(x) R, added to an output if there is one, with one product for each group."""
    r, out_features = block.shape[-2:]
    groups = sums.shape[-1] // r
    block = pad_to_multiple(block.to(sums.dtype), groups, dim=-1)
    parts = torch.unflatten(sums, -1, (groups, r)).transpose(-3, -2)  # (..., g, n, r)
    columns = torch.unflatten(block, -1, (-1, groups)).movedim(-1, -3)  # (..., g, r, out / g)
    products = (parts @ columns).movedim(-3, -1)  # (..., n, out / g, g)
    delta = scaled(products.flatten(-2)[..., :out_features], scale)
    return delta if output is None else add_to(output, delta)
