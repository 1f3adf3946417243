"""Views: operations on an effective weight whose result is again one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from disha.effective.rules import Operation, rule, rule_with_operation
from disha.effective.weight import EffectiveWeight, base_inside, make_effective
from disha.functional import Layout, Update
from disha.functional.new_rows import ChangeRows, NewRows
from disha.functional.parts import updates_of_outputs
from disha.functional.shard_sums import is_inexact
from disha.functional.weight_updates import Change, Updates


def _make_view(
    weight: EffectiveWeight,
    base: Tensor,
    layout: Layout,
    change: Change,
    change_rows: ChangeRows = lambda rows: rows,
) -> Any:
    """Return a view of a weight, whose W is `base`; NotImplemented if a block can't be cut so.

    Where no block acts, the view is that of W.
    """
    updates = weight.updates.map(change, change_rows)
    if updates is None:
        return NotImplemented
    return make_effective(base, layout, updates) if updates.acts else base


@rule("mT")
def transpose_matrices(weight: Any) -> Any:
    """Return the weight with its matrices transposed; NotImplemented if no layout has them so."""
    layout = weight.weight_layout.transposed()
    if layout is None:
        return NotImplemented
    base = torch.transpose(weight.base, -2, -1)
    return make_effective(base, layout, weight.updates.transposed())


@rule("t T")
def _t(weight: Any) -> Any:
    return transpose_matrices(weight) if weight.base.dim() == 2 else NotImplemented


@rule("transpose swapdims swapaxes")
def _transpose(weight: Any, *dims: int, **named: int) -> Any:
    ndim = weight.base.dim()
    axes = (*dims, *named.values())
    if any(not -ndim <= axis < ndim for axis in axes):
        return NotImplemented  # torch raises
    swapped = {axis % ndim for axis in axes}
    return transpose_matrices(weight) if swapped == {ndim - 2, ndim - 1} else NotImplemented


_INDEX_DTYPES = (torch.int64, torch.int32)
"""The dtypes of a tensor of indices. To torch, uint8 and bool are masks."""


def is_index(index: Any) -> bool:
    """Whether an index is an int or a tensor of ints, and not a mask."""
    if isinstance(index, Tensor):
        return index.dtype in _INDEX_DTYPES and not isinstance(index, EffectiveWeight)
    return isinstance(index, int) and not isinstance(index, bool)


def select_item(weight: Any, index: Any) -> Any:
    """Return matrices of a stack, or outputs of a matrix; NotImplemented for any other index."""
    layout = weight.weight_layout
    if layout.pattern == "out in" and isinstance(index, slice):
        start, stop, step = index.indices(weight.base.shape[0])
        if step != 1 or stop <= start:
            return NotImplemented
        return select_outputs(weight, start, stop)
    if not layout.experts_first or not (is_index(index) or isinstance(index, slice)):
        return NotImplemented
    base = weight.base[index]
    if base.dim() > weight.base.dim():
        return NotImplemented  # an index of several dimensions
    if base.dim() < weight.base.dim():
        layout = layout.of_one_expert()

    def select_blocks(updates: Sequence[Update]) -> Sequence[Update]:
        return [update.select_matrices(index) for update in updates]

    return _make_view(weight, base, layout, select_blocks)


def select_outputs(weight: Any, start: int, stop: int) -> Any:
    """Return the effective weight of some outputs of a matrix (out, in)."""
    geometry = weight.weight_layout.geometry(weight.base.shape)

    def cut_blocks(updates: Sequence[Update]) -> Sequence[Update] | None:
        return updates_of_outputs(updates, start, stop, geometry)

    def cut_rows(rows: NewRows) -> NewRows | None:
        part = rows.of_part([(start, stop), (0, geometry.in_features)])
        return part if part.block.numel() else None

    return _make_view(weight, weight.base[start:stop], weight.weight_layout, cut_blocks, cut_rows)


@rule_with_operation("split chunk")
def _split_or_chunk(func: Operation, weight: Any, *args: Any, **kwargs: Any) -> Any:
    return split_outputs(weight, func(weight.base, *args, **kwargs))


def split_outputs(weight: Any, bases: Sequence[Tensor]) -> Any:
    """Return the parts of a matrix (out, in), cut along its outputs as W is into `bases`."""
    sizes = [base.shape[0] for base in bases]
    if weight.weight_layout.pattern != "out in" or sum(sizes) != weight.base.shape[0]:
        return NotImplemented  # cut along another axis
    parts = []
    start = 0
    for size in sizes:
        part = select_outputs(weight, start, start + size)
        if part is NotImplemented:
            return NotImplemented
        parts.append(part)
        start += size
    return tuple(parts)


@rule("unbind")
def _unbind(weight: Any, dim: int = 0) -> Any:
    layout = weight.weight_layout
    if dim or not layout.experts_first:
        return NotImplemented
    updates = weight.updates.shared
    if not updates:  # samples are routed, or nothing acts
        return tuple(select_item(weight, index) for index in range(weight.base.shape[0]))
    item_layout = layout.of_one_expert()
    bases = weight.base.unbind(0)
    updates_of_items = zip(*[update.unstack() for update in updates])
    return tuple(
        make_effective(base, item_layout, Updates(item_updates))
        for base, item_updates in zip(bases, updates_of_items)
    )


@rule("index_select select")
def _select(weight: Any, dim: int, index: Any) -> Any:
    if dim or not weight.weight_layout.experts_first:
        return NotImplemented
    return select_item(weight, index)


@rule_with_operation("to type type_as float double half bfloat16 contiguous")
def _cast(func: Operation, weight: Any, *args: Any, **kwargs: Any) -> Any:
    named = {name: base_inside(value) for name, value in kwargs.items()}
    base = func(base_inside(weight), *map(base_inside, args), **named)
    if not isinstance(weight, EffectiveWeight) or not isinstance(base, Tensor):
        return base  # of another tensor, which is cast like this weight, or the name of its type
    if not is_inexact(base) or base.device != weight.base.device:
        return NotImplemented  # the blocks stay on their device
    return make_effective(base, weight.weight_layout, weight.updates)


@rule_with_operation("detach data")
def _detach(func: Operation, weight: Any) -> Any:
    if is_compiling():
        func = Tensor.detach  # dynamo can't take `.data` of a tensor that a rule has read

    def detach_blocks(updates: Sequence[Update]) -> Sequence[Update]:
        return [update.replace(block=func(update.block)) for update in updates]

    def detach_rows(rows: NewRows) -> NewRows:
        return rows.replace(block=func(rows.block))

    return _make_view(weight, func(weight.base), weight.weight_layout, detach_blocks, detach_rows)
