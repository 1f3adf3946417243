"""Products of inputs with a weight and its updates: W x + b + sum of s dW x.

Each function computes what one of torch's products would compute with the effective weight
W + sum of s dW, without forming it where the method of an update allows that. Every dW comes from
the original W, so the order of updates does not matter.

Source: arXiv 2409.15371, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from disha.functional.embedding import embedding_delta
from disha.functional.fused import gathered_product
from disha.functional.layouts import Layout, Rows, place_rows, take_rows
from disha.functional.methods import METHODS, delta_weight, kept_block, matrix_block, method_of
from disha.functional.shards import (
    Scale,
    added,
    merged_weight,
    pad_to_multiple,
    scaled,
    scaled_sums,
)

__all__ = [
    "Update",
    "adapted_conv",
    "adapted_grouped",
    "adapted_linear",
    "adapted_lookup",
    "adapted_stack",
    "conv_update",
    "effective_weight",
    "linear_update",
    "lookup_update",
    "over_all_rows",
]

MATRIX = Layout("out in")
STACK = Layout("expert out in")


class Update(NamedTuple):
    """One block on one weight.

    Attributes:
        method: the block's method.
        block: D, as it is kept.
        scale: runtime scale s.
        dropout: probability of zeroing each of the block's inputs, now; 0 in evaluation.
        rows: the outputs that the block adapts; empty for all.
        source: (stack, indices) where `block` is stack[indices], as for experts chosen by token;
            else None.

    Examples:
        >>> import torch
        >>> from disha.functional import Update
        >>> Update("bone", torch.zeros(2, 3), scale=0.5).rows
        ()
    """

    method: str
    block: Tensor
    scale: Scale = 1.0
    dropout: float = 0.0
    rows: Rows = ()
    source: tuple[Tensor, Tensor] | None = None

    def at(self, index: int | slice | Tensor) -> Update:
        """Return the update of one matrix of a stack, or of some.

        Args:
            index: which.
        """
        source = None
        if isinstance(index, Tensor) and index.dim() == 1:
            stack, chosen = self.source or (self.block, None)
            source = (stack, index if chosen is None else chosen[index])
        return self._replace(block=self.block[index], source=source)


def effective_weight(weight: Tensor, layout: Layout, updates: Sequence[Update]) -> Tensor:
    """Return W + sum of s dW, computed in float32 (float64 for float64) and rounded once.

    Args:
        weight: W.
        layout: its layout.
        updates: the blocks; their dropout does not act.

    Returns:
        Tensor of W's shape and dtype.

    Examples:
        >>> import torch
        >>> from disha.functional import Layout, Update, effective_weight
        >>> update = Update("bone", torch.ones(2, 1))
        >>> effective_weight(torch.zeros(1, 3), Layout("out in"), [update])
        tensor([[1., 1., 1.]])
    """
    deltas = ((delta_weight(u.method, layout, u.block, weight, u.rows), u.scale) for u in updates)
    return merged_weight(weight, deltas) if updates else weight


# --- one matrix ----------------------------------------------------------------------------------


def adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[Update]
) -> Tensor:
    """Return (W + sum of s dW) x + b, as cheaply as the methods allow.

    Args:
        x: input (..., in).
        weight: W (out, in).
        bias: b (out,), or None.
        updates: the blocks, at least one.

    Returns:
        Tensor (..., out), in the dtype that the plain linear layer returns.

    Examples:
        >>> import torch
        >>> from disha.functional import Update, adapted_linear
        >>> bone, bat = torch.ones(1, 2), torch.eye(2)[None]
        >>> updates = [Update("bone", bone), Update("bat", bat, 0.5)]
        >>> adapted_linear(torch.ones(2), torch.eye(2), None, updates)
        tensor([4., 4.])
    """
    if len(updates) == 1:  # what almost every layer has
        method, block, scale, dropout, rows, _ = updates[0]
        if not dropout and not rows:
            own = METHODS.get(method) or method_of(method)  # method_of raises
            output = own.linear_product(x, weight, bias, block, scale)
            if output is not None:
                return output
    folded, others = _divided(over_all_rows(updates, MATRIX, weight.shape[0]))
    if folded:
        output = _folded(x, weight, bias, folded)
    else:
        output = _fused(x, weight, bias, others[0])
        if output is not None:
            others = others[1:]
    # The updates come before W x. Backward runs the other way: W x leaves a gradient of x, and the
    # updates add to it.
    deltas = [linear_update(x, weight, update) for update in others]
    return reduce(added, deltas, F.linear(x, weight, bias) if output is None else output)


def linear_update(x: Tensor, weight: Tensor, update: Update) -> Tensor:
    """Return s dW x of one update of a matrix, or of a stack of them, with its dropout.

    Args:
        x: input (..., in).
        weight: W (..., out, in); stacks multiply as in `torch.matmul`. Of methods that do not read
            it, only the shape counts.
        update: the update.

    Returns:
        Tensor (..., out).

    Examples:
        >>> import torch
        >>> from disha.functional import Update, linear_update
        >>> linear_update(torch.ones(4), torch.zeros(1, 4), Update("bone", torch.ones(2, 1)))
        tensor([4.])
    """
    method, rows = method_of(update.method), update.rows
    geometry = (MATRIX if weight.dim() == 2 else STACK).geometry(weight.shape, rows)
    x = F.dropout(x, update.dropout) if update.dropout else x
    # Backward keeps the indices, not the gathered blocks: there may be one for each token.
    multiply = torch.matmul
    if update.source is not None:
        stack, index = update.source
        multiply = partial(gathered_product, stack=stack, index=index)
    output = method.update_product(x, update.block, geometry.out_features, update.scale, multiply)
    if output is None:
        matrices = take_rows(weight, rows) if method.reads_weight else None
        delta = method.delta(update.block, geometry, matrices)
        output = torch.matmul(x.to(delta.dtype), delta.mT) * update.scale
    return place_rows(output, rows, weight.shape[-2], dim=-1)


def _fused(x: Tensor, weight: Tensor, bias: Tensor | None, update: Update) -> Tensor | None:
    """Return the product with one update in one go, or None where there is no such way."""
    if update.dropout or update.rows:
        return None
    method = method_of(update.method)
    return method.linear_product(x, weight, bias, update.block, update.scale)


def _folded(x: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[Update]) -> Tensor:
    """Return the product with the updates folded into W."""
    if any(update.rows for update in updates):
        return _in_groups_of_rows(x, weight, bias, updates)
    first = updates[0]
    alike = {(update.method, update.block.shape) for update in updates}
    if len(alike) == 1 and method_of(first.method).linear:
        # dW is linear in D: the blocks add up before they meet W.
        total = first if len(updates) == 1 else first._replace(block=_sum(updates), scale=1.0)
        output = _fused(x, weight, bias, total)
        if output is not None:
            return output
    return F.linear(x, effective_weight(weight, MATRIX, updates), bias)


def _sum(updates: Sequence[Update]) -> Tensor:
    return reduce(torch.add, [update.block * update.scale for update in updates])


def _in_groups_of_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[Update]
) -> Tensor:
    """Return the product where updates fold into some rows of W: one product for each group."""
    groups: dict[Rows, list[Update]] = {}
    for update in updates:
        groups.setdefault(update.rows, []).append(update._replace(rows=()))
    gaps = _gaps([one for rows in groups for one in rows], weight.shape[0])
    if () in groups or gaps is None:  # updates of several groups meet in one row
        return F.linear(x, effective_weight(weight, MATRIX, updates), bias)
    pieces: dict[int, Tensor] = {}
    for rows, members in groups.items():
        offset = None if bias is None else take_rows(bias, rows, dim=0)
        output = _folded(x, take_rows(weight, rows), offset, members)
        parts = torch.split(output, [stop - first for first, stop in rows], -1)
        pieces |= {first: one for (first, _), one in zip(rows, parts, strict=True)}
    for first, stop in gaps:
        offset = None if bias is None else bias[first:stop]
        pieces[first] = F.linear(x, weight[first:stop], offset)
    return torch.cat([pieces[first] for first in sorted(pieces)], -1)


def _gaps(taken: Sequence[tuple[int, int]], size: int) -> Rows | None:
    """Return the ranges that are not taken, or None where some overlap."""
    gaps, end = [], 0
    for first, stop in sorted(taken):
        if first < end:
            return None
        if first > end:
            gaps.append((end, first))
        end = stop
    return (*gaps, (end, size)) if end < size else tuple(gaps)


def _divided(updates: Sequence[Update]) -> tuple[list[Update], list[Update]]:
    """Return the updates that are folded into the weight, and those that are added to a product."""
    folded: list[Update] = []
    others: list[Update] = []
    for update in updates:
        adds = method_of(update.method).reduces or update.dropout
        (others if adds else folded).append(update)
    return folded, others


# --- updates of some rows ------------------------------------------------------------------------


def over_all_rows(updates: Sequence[Update], layout: Layout, out_features: int) -> Sequence[Update]:
    """Return the updates; those of some rows become updates of all rows where the method can.

    Args:
        updates: the updates.
        layout: the weight's layout.
        out_features: its outputs.

    Examples:
        >>> import torch
        >>> from disha.functional import Layout, Update, over_all_rows
        >>> updates = [Update("bone", torch.ones(1, 2), rows=((1, 3),))]
        >>> over_all_rows(updates, Layout("out in"), 4)[0].block
        tensor([[0., 1., 1., 0.]])
    """
    if not any(update.rows for update in updates):
        return updates
    wide: list[Update] = []
    for update in updates:
        one = _over_all_rows(update, layout, out_features) if update.rows else update
        # The blocks of q, k and v in one packed weight, say, add up to one block.
        if wide and update.rows and not one.rows and _add_up(wide[-1], one):
            wide[-1] = wide[-1]._replace(block=wide[-1].block + one.block)
        else:
            wide.append(one)
    return wide


def _over_all_rows(update: Update, layout: Layout, out_features: int) -> Update:
    method, scale = method_of(update.method), update.scale
    block = matrix_block(update.method, layout, update.block)
    wide = method.over_rows(block, update.rows, out_features)
    if wide is None:
        return update
    if method.linear and (isinstance(scale, Tensor) or scale != 1.0):
        wide, scale = (wide * scale).to(wide.dtype), 1.0
    block = kept_block(update.method, layout, wide)
    return update._replace(block=block, scale=scale, rows=(), source=None)


def _add_up(first: Update, second: Update) -> bool:
    """Whether one update, whose block is the sum of both blocks, does the same as these two."""
    if isinstance(first.scale, Tensor) or first.scale != 1.0 or second.scale != 1.0:
        return False
    return (
        method_of(first.method).linear
        and not first.rows
        and first.method == second.method
        and first.dropout == second.dropout == 0.0
        and (first.block.shape, first.block.dtype) == (second.block.shape, second.block.dtype)
    )


# --- stacks of matrices --------------------------------------------------------------------------


def adapted_stack(x: Tensor, weight: Tensor, updates: Sequence[Update]) -> Tensor:
    """Return x (W + sum of s dW)^T, a product for each matrix of a stack.

    Args:
        x: input (experts, n, in).
        weight: W (experts, out, in).
        updates: the blocks.

    Returns:
        Tensor (experts, n, out).

    Examples:
        >>> import torch
        >>> from disha.functional import Update, adapted_stack
        >>> x, W, D = torch.ones(3, 2, 4), torch.zeros(3, 5, 4), torch.ones(3, 2, 5)
        >>> adapted_stack(x, W, [Update("bone", D)]).unique()
        tensor([4.])
    """
    folded, others = _divided(over_all_rows(updates, STACK, weight.shape[-2]))
    output = None
    if len(folded) == 1 and not folded[0].rows:
        method, block, scale, *_ = folded[0]
        output = method_of(method).stack_product(x, weight, block, scale)
    if output is None:
        output = torch.matmul(x, effective_weight(weight, STACK, folded).mT)
    return reduce(added, [linear_update(x, weight, update) for update in others], output)


def adapted_grouped(
    multiply: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    updates: Sequence[Update],
) -> Tensor:
    """Return x (W_e + sum of s dW_e)^T, where consecutive rows of x belong to one matrix e each.

    One shard sum serves all matrices, and one grouped product adds an update to all rows.

    Args:
        multiply: the grouped product, `torch._grouped_mm` or one called alike.
        x: input (n, in), ordered by matrix.
        weight: W (experts, out, in).
        offsets: (experts,), where the rows of each matrix end.
        updates: the blocks.

    Returns:
        Tensor (n, out).

    Examples:
        >>> import torch
        >>> from disha.functional import Update, adapted_grouped
        >>> x, W, D = torch.ones(3, 8), torch.zeros(2, 4, 8), torch.ones(2, 2, 4)
        >>> ends = torch.tensor([1, 3], dtype=torch.int32)
        >>> adapted_grouped(torch._grouped_mm, x, W, ends, [Update("bone", D)]).unique()
        tensor([8.])
    """
    updates = over_all_rows(updates, STACK, weight.shape[-2])
    folded, others = _divided(updates)
    dense = folded or not all(method_of(update.method).reduces for update in others)
    if dense and not torch.compiler.is_compiling():
        return _one_by_one(x, weight, offsets, updates)
    output = multiply(x, effective_weight(weight, STACK, folded).mT, offs=offsets)
    deltas = [_grouped_update(multiply, x, weight, offsets, update) for update in others]
    return reduce(added, deltas, output)


def _grouped_update(
    multiply: Callable[..., Tensor], x: Tensor, weight: Tensor, offsets: Tensor, update: Update
) -> Tensor:
    method = method_of(update.method)
    x = F.dropout(x, update.dropout) if update.dropout else x
    if not method.reduces or update.rows:
        delta = delta_weight(update.method, STACK, update.block, weight, update.rows)
        return multiply(x, delta.to(x.dtype).contiguous().mT, offs=offsets) * update.scale
    block = method.untiled(update.block, weight.shape[-2]).to(x.dtype)
    sums, regain = scaled_sums(x, block.shape[-2], x.dtype, update.scale)
    # The product needs rows of a multiple of 16 bytes, so r is padded.
    step = 16 // block.element_size()
    sums = pad_to_multiple(sums, step, dim=-1)
    columns = pad_to_multiple(block.mT, step, dim=-1).contiguous()
    return scaled(multiply(sums, columns.mT, offs=offsets), regain)


def _one_by_one(x: Tensor, weight: Tensor, offsets: Tensor, updates: Sequence[Update]) -> Tensor:
    """Return the grouped product with one product for each matrix that has rows."""
    outputs, start = [], 0
    for index, end in enumerate(offsets.tolist()):
        if end > start or not x.shape[0]:
            own = [update.at(index) for update in updates]
            outputs.append(adapted_linear(x[start:end], weight[index], None, own))
        start = end
    if start < x.shape[0]:  # rows of no matrix
        like = outputs[0] if outputs else x
        outputs.append(like.new_zeros(x.shape[0] - start, weight.shape[-2]))
    return torch.cat(outputs)


# --- convolutions and lookups --------------------------------------------------------------------


def adapted_conv(
    convolve: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: Layout,
    groups: int,
    updates: Sequence[Update],
) -> Tensor:
    """Return the convolution of x with W + sum of s dW, plus b.

    Args:
        convolve: the convolution of an input, a weight and a bias, with everything else given.
        x: input (..., in, *positions).
        weight: W.
        bias: b (out,), or None.
        layout: W's layout.
        groups: groups of the convolution.
        updates: the blocks.

    Returns:
        Tensor (..., out, *positions).

    Examples:
        >>> import torch
        >>> from disha.functional import Layout, Update, adapted_conv
        >>> x, W, D = torch.ones(1, 4, 5), torch.zeros(1, 4, 1), torch.ones(1, 2, 1)
        >>> conv = torch.nn.functional.conv1d
        >>> adapted_conv(conv, x, W, None, Layout("out in *kernel"), 1, [Update("bone", D)])
        tensor([[[4., 4., 4., 4., 4.]]])
    """
    out_features = layout.geometry(weight.shape).out_features
    folded, others = _divided(over_all_rows(updates, layout, out_features))
    output = convolve(x, effective_weight(weight, layout, folded), bias)
    for update in others:
        output = added(output, conv_update(convolve, x, weight, layout, groups, update))
    return output


def conv_update(
    convolve: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor,
    weight: Tensor,
    layout: Layout,
    groups: int,
    update: Update,
) -> Tensor:
    """Return the convolution of x with s dW of one update, with its dropout.

    dW convolved with x is the block convolved with the shard sum of each group's channels.

    Args:
        convolve: the convolution of an input, a weight and a bias, with everything else given.
        x: input (..., in, *positions).
        weight: W.
        layout: its layout.
        groups: groups of the convolution.
        update: the update.

    Returns:
        Tensor (..., out, *positions).

    Examples:
        >>> import torch
        >>> from disha.functional import Layout, Update, conv_update
        >>> x, W, D = torch.ones(1, 4, 3), torch.zeros(1, 4, 1), torch.ones(1, 2, 1)
        >>> conv, update = torch.nn.functional.conv1d, Update("bone", D)
        >>> conv_update(conv, x, W, Layout("out in *kernel"), 1, update)
        tensor([[[4., 4., 4.]]])
    """
    out_features = layout.geometry(weight.shape).out_features
    (update,) = over_all_rows([update], layout, out_features)
    x = F.dropout(x, update.dropout) if update.dropout else x
    method, block = method_of(update.method), update.block
    if not method.reduces or update.rows:
        delta = delta_weight(update.method, layout, block, weight, update.rows)
        return convolve(x, delta.to(x.dtype), None) * update.scale
    if block.shape[1 - layout.shard_dim] != out_features:  # a tile
        whole = method.untiled(matrix_block(update.method, layout, block), out_features)
        block = kept_block(update.method, layout, whole)
    r, channels = block.shape[layout.shard_dim] // layout.groups, 1 - weight.dim()
    if groups > 1:
        x = torch.unflatten(x, channels, (groups, x.shape[channels] // groups))
    sums, regain = scaled_sums(x, r, block.dtype, update.scale, dim=channels)
    if groups > 1:
        sums = torch.flatten(sums, channels - 1, channels)
    return scaled(convolve(sums, block, None), regain)


def adapted_lookup(
    look_up: Callable[[Tensor], Tensor],
    indices: Tensor,
    weight: Tensor,
    layout: Layout,
    updates: Sequence[Update],
) -> Tensor:
    """Return the rows of W + sum of s dW for some indices.

    Args:
        look_up: the lookup of `indices` in a weight.
        indices: integer tensor (...).
        weight: W (index, out).
        layout: its layout, "index out".
        updates: the blocks.

    Returns:
        Tensor (..., out).

    Examples:
        >>> import torch
        >>> from disha.functional import Layout, Update, adapted_lookup
        >>> W, D, i = torch.zeros(4, 1), torch.tensor([[1.0], [2.0]]), torch.tensor([0, 3])
        >>> adapted_lookup(lambda w: w[i], i, W, Layout("index out"), [Update("bone", D)])
        tensor([[1.],
                [2.]])
    """
    folded, others = _divided(over_all_rows(updates, layout, weight.shape[-1]))
    output = look_up(effective_weight(weight, layout, folded))
    for update in others:
        output = added(output, lookup_update(look_up, indices, weight, layout, update))
    return output


def lookup_update(
    look_up: Callable[[Tensor], Tensor],
    indices: Tensor,
    weight: Tensor,
    layout: Layout,
    update: Update,
) -> Tensor:
    """Return the rows of s dW of one update for some indices, with its dropout.

    Args:
        look_up: the lookup of `indices` in a weight.
        indices: integer tensor (...).
        weight: W (index, out).
        layout: its layout, "index out".
        update: the update.

    Returns:
        Tensor (..., out).

    Examples:
        >>> import torch
        >>> from disha.functional import Layout, Update, lookup_update
        >>> W, i = torch.zeros(4, 1), torch.tensor([0, 3])
        >>> update = Update("bone", torch.tensor([[1.0], [2.0]]))
        >>> lookup_update(lambda w: w[i], i, W, Layout("index out"), update)
        tensor([[1.],
                [2.]])
    """
    (update,) = over_all_rows([update], layout, weight.shape[-1])
    if method_of(update.method).reduces and not update.rows:
        padding_idx, dim = layout.padding_idx, weight.shape[-1]
        delta = embedding_delta(indices, update.block, dim, update.scale, padding_idx)
    else:
        delta = delta_weight(update.method, layout, update.block, weight, update.rows)
        delta = look_up(delta.to(weight.dtype)) * update.scale
    if not update.dropout:
        return delta
    # The input is one-hot: to drop it out is to drop the whole update of a token.
    return delta * F.dropout(torch.ones_like(delta[..., :1]), update.dropout)
