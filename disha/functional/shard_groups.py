"""Groups of shards: an output sees the shards of its own group, and not all of them.

With g groups, shard b is in group b mod g, and output o in group o mod g:

    dW[o, i] = D[i mod r, o]   if (i // r) mod g = o mod g,   else 0

The block D (r, out) is that of Bone, and so is the number of multiplications, but the rank of dW
rises to g r. With one group, it is Bone. Written with shard sums, dW x = S(x) R, where S(x) has the
size g r and R has zeros:

    R[k r + j, o] = D[j, o]    if o mod g = k,                else 0

`multiply_by_groups` multiplies no zeros: for each group k, it multiplies the part k of S(x) by the
columns of D of the outputs in group k. If each group has one shard, S(x) is x. Where the product
can be added to W x in place (`_AddByGroups`), autograd saves S(x) and D, and no other tensor.
Elsewhere, as in compiled code and for stacks, it is a plain product of copies by group.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from disha.functional.layouts import Geometry
from disha.functional.method import ALL_GROUPS, Down, Groups, Method
from disha.functional.shard_sums import (
    add_to,
    may_define_backward,
    scaled,
    shard_count,
    size_of_sum,
)
from disha.private_torch import is_view


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

    def dense_up(self, up: Tensor, k: int, geometry: Geometry) -> Tensor:
        return group_factor(up, k // up.shape[-2])

    def multiply_up(
        self,
        sums: Tensor,
        up: Tensor,
        geometry: Geometry,
        factor: float = 1.0,
        output: Tensor | None = None,
    ) -> Tensor:
        return multiply_by_groups(sums, up, factor, output)

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
_NAME = re.compile(rf"{_PREFIX}(_all|[2-9]|[1-9][0-9]{{1,8}})")
"""The names of Bone with groups of shards."""


def method_with_groups(groups: Groups) -> Method | None:
    """Return Bone with this number of groups of shards."""
    if groups == ALL_GROUPS:
        return find_groups(f"{_PREFIX}_all")
    # A weight has as many groups as it can, so a larger number than names can have means this.
    return find_groups(f"{_PREFIX}{min(groups, 999_999_999)}")


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
    sums: Tensor, block: Tensor, factor: float = 1.0, output: Tensor | None = None
) -> Tensor:
    """Return f S(x) R, added to an output if there is one, with one product for each group."""
    groups = sums.shape[-1] // block.shape[-2]
    block = block.to(sums.dtype)
    may_overflow = sums.dtype == torch.float16 and factor != 1.0
    if output is not None and not may_overflow and _may_write(output, sums, block):
        sums = scaled(sums, factor)
        return _AddByGroups.apply(output, sums, block, groups)  # type: ignore[no-untyped-call]
    delta = scaled(_multiply_each(sums, block, groups), factor)
    return delta if output is None else add_to(output, delta)


def _multiply_each(sums: Tensor, block: Tensor, groups: int) -> Tensor:
    """Return S(x) R, as a batch of products: one for each group."""
    products = []
    for outputs, count in _cut_into_whole_groups(block, groups):
        parts, columns = _split_operands(sums, block[..., outputs], count)
        products.append((parts @ columns).movedim(-3, -1).flatten(-2))
    return _join_outputs(products)


def _cut_into_whole_groups(block: Tensor, groups: int) -> list[tuple[slice, int]]:
    """Return ranges of outputs, and for each, a number of groups with equally many outputs.

    If g does not divide the outputs, the last ones are fewer than g: one in each of the first
    groups.
    """
    out_features = block.shape[-1]
    last = out_features % groups
    ranges = [(slice(0, out_features - last), groups)]
    if last:
        ranges.append((slice(out_features - last, out_features), last))
    return ranges


def _join_outputs(pieces: list[Tensor]) -> Tensor:
    """Return ranges of outputs beside each other. Usually there is one, which is not copied."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)


def _split_operands(sums: Tensor, block: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return the parts of S(x) and of D of the first groups: (..., g, n, r), (..., g, r, out / g).

    D has the outputs of these groups alone.
    """
    r = block.shape[-2]
    parts = torch.unflatten(sums[..., : groups * r], -1, (groups, r)).transpose(-3, -2)
    return parts, _split_outputs(block, groups)


def _split_outputs(tensor: Tensor, groups: int) -> Tensor:
    """Return the outputs of each group of a tensor (..., m, out), as (..., g, m, out / g)."""
    return torch.unflatten(tensor, -1, (-1, groups)).movedim(-1, -3)


# --- the same product, added to W x with fewer copies --------------------------------------------


def _may_write(output: Tensor, sums: Tensor, block: Tensor) -> bool:
    """Whether `_AddByGroups` can add the product to this output."""
    if output.dim() != 2:  # of a stack, g would be a second batch dimension, and `bmm` has one
        return False
    if output.dtype is not sums.dtype or not may_define_backward(output, sums, block):
        return False
    return not is_view(output)  # the last question, because the compiler can't trace it


class _AddByGroups(torch.autograd.Function):
    """(y (n, out), S(x) (n, g r), D (r, out), g) -> y + S(x) R, in place.

    A copy of the outputs costs as much time as their products. So forward makes none, and backward
    makes one: it brings the gradient of y into an order that both of its products can read.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, sums: Tensor, block: Tensor, groups: int) -> Tensor:
        ctx.save_for_backward(sums, block)
        ctx.mark_dirty(output)
        ctx.groups = groups
        for outputs, count in _cut_into_whole_groups(block, groups):
            parts, columns = _split_operands(sums, block[:, outputs], count)
            _split_outputs(output[:, outputs], count).add_(_multiply_each_group(parts, columns))
        return output

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        sums, block = ctx.saved_tensors
        _, needs_sums, needs_block, _ = ctx.needs_input_grad
        grad_sums = None
        grad_blocks = []
        for outputs, count in _cut_into_whole_groups(block, ctx.groups):
            parts, columns = _split_operands(sums, block[:, outputs], count)
            # In this order of memory, a batched product takes the gradient as it is.
            by_tokens = torch.unflatten(grad[:, outputs], -1, (-1, count)).mT.contiguous()
            grad_outputs = by_tokens.transpose(0, 1)  # (g, n, out / g)
            if needs_sums:
                grad_parts = _multiply_each_group(grad_outputs, columns.mT.conj())
                grad_parts = grad_parts.transpose(0, 1).flatten(-2)
                if grad_sums is None:
                    grad_sums = grad_parts
                else:
                    missing = sums.shape[1] - grad_parts.shape[1]
                    grad_sums = grad_sums + F.pad(grad_parts, (0, missing))
            if needs_block:
                grad_columns = parts.mT.conj() @ grad_outputs  # (g, r, out / g)
                grad_blocks.append(grad_columns.movedim(0, -1).flatten(-2))
        grad_block = _join_outputs(grad_blocks) if needs_block else None
        return grad, grad_sums, grad_block, None


def _multiply_each_group(first: Tensor, second: Tensor) -> Tensor:
    """Return the products (g, n, columns) of matrices (g, n, m) and (g, m, columns).

    In memory, all groups of a token lie beside each other, as they do in the outputs and in S(x).
    """
    if torch.is_grad_enabled():  # in a second derivative, which can't have `out`
        return first @ second
    groups, tokens, _ = first.shape
    by_tokens = first.new_empty(tokens, groups, second.shape[-1])
    return torch.bmm(first, second, out=by_tokens.transpose(0, 1))
