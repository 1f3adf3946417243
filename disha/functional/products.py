"""Products of inputs with a weight and its updates: W x + b + sum of s dW x.

Each function returns the product with the effective weight W + sum of s dW, and avoids forming
that weight where possible. There are three cases:

- the method `reduces`, so dW x = S(x) R: it adds the same product of S(x) with R, a smaller weight;
- the method does not: it folds dW into W, so there is one product;
- the method does not, and dropout gives the update its own input: it adds the product with dW.

Every dW comes from the original W, so the order of updates does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import reduce
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils.checkpoint import checkpoint

from disha.functional.bone import embedding_delta
from disha.functional.layouts import Geometry, Layout, Rows, place_rows
from disha.functional.methods import Method
from disha.functional.private_torch import (
    any_autocast,
    modes_active,
    must_not_write,
    transforms_active,
)
from disha.functional.shard_sums import (
    Scale,
    added,
    merged_weight,
    pad_to_multiple,
    scaled,
    shard_count,
    shard_sum,
    shard_sums,
    tiled,
    without_autocast,
)

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(input, weight, bias or None) -> the product. Everything else, such as a stride, is fixed."""

MATRIX = Layout("out in")
STACK = Layout("expert out in")


class Update(NamedTuple):
    """One block on one weight.

    Attributes:
        method: the block's method.
        block: D, as layers keep it (`Method.kept_block`).
        scale: runtime scale s.
        dropout: current probability of zeroing each of the block's inputs; 0 in evaluation.
        rows: the outputs that the block adapts; empty for all.
        chosen: indices of the matrices of a stack, for experts chosen by token; None for all.
        r: the shard size; methods of `METHODS` know it from their block.

    Examples:
        >>> import torch
        >>> from disha.functional import Update, method_of
        >>> Update(method_of("bone"), torch.zeros(2, 3), scale=0.5).rows
        ()
    """

    method: Method
    block: Tensor
    scale: Scale = 1.0
    dropout: float = 0.0
    rows: Rows = ()
    chosen: Tensor | None = None
    r: int = 0

    # Methods, because torch 2.8 compiles neither `_replace` nor a property of a tuple.

    def is_apart(self) -> bool:
        """Whether its product is added to that of W, and dW is not folded into W."""
        return bool(self.dropout or (self.rows and self.method.replaces))

    def replace(self, **fields: Any) -> Update:
        """Return the update with other values of some fields."""
        return Update(**(dict(zip(Update._fields, self)) | fields))

    def chosen_block(self) -> Tensor:
        """Return the block of the chosen matrices."""
        return self.block if self.chosen is None else self.block[self.chosen]

    def delta_weight(self, layout: Layout, weight: Tensor) -> Tensor:
        """Return dW, without the scale."""
        return self.method.delta_weight(layout, self.chosen_block(), weight, self.rows, self.r)

    def select_matrices(self, index: int | slice | Tensor) -> Update:
        """Return the update of one matrix of a stack, or of several."""
        if isinstance(index, Tensor) and index.dim() == 1:
            # The blocks are gathered only where they are used: there may be one for each token.
            return self.replace(chosen=index if self.chosen is None else self.chosen[index])
        return self.replace(block=self.chosen_block()[index], chosen=None)

    def unstack(self) -> list[Update]:
        """Return the updates of all matrices of a stack, with one gradient for the block."""
        return [self.replace(block=block, chosen=None) for block in self.chosen_block().unbind(0)]


class Reduced(NamedTuple):
    """What updates add if their method `reduces`: S(x) times s R; R is (..., r, out or r_out)."""

    matrix: Tensor
    dropout: float
    chosen: Tensor | None = None


def computed_weight(weight: Tensor, layout: Layout, updates: Sequence[Update]) -> Tensor:
    """Return W + sum of s dW, computed in float32 (float64 for float64) and rounded once.

    Args:
        weight: W.
        layout: its layout.
        updates: the blocks; their dropout is ignored.

    Returns:
        Tensor of W's shape and dtype.

    Examples:
        >>> import torch
        >>> from disha.functional import Layout, Update, computed_weight, method_of
        >>> update = Update(method_of("bone"), torch.ones(2, 1))
        >>> computed_weight(torch.zeros(1, 3), Layout("out in"), [update])
        tensor([[1., 1., 1.]])
    """
    if not updates:
        return weight
    deltas = [(update.delta_weight(layout, weight), update.scale) for update in updates]
    return merged_weight(weight, deltas)


# --- any product ---------------------------------------------------------------------------------


def adapted_product(
    multiply: Product,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: Layout,
    updates: Sequence[Update],
) -> Tensor:
    """Return a product of x with W + sum of s dW, plus b.

    `multiply` is that of a linear layer, with x (..., in), of a convolution, with x
    (..., in, *positions), or of a lookup, with indices x (...). A linear product with a table, as
    in an output head that is tied to an embedding, has x (..., out), and its result (..., in). A
    lookup in the weight of a linear layer has the indices of outputs.
    """
    geometry = layout.geometry(weight.shape)
    reduced_parts, folded, others = _divided(updates, layout, geometry)
    output = multiply(x, computed_weight(weight, layout, folded), bias)
    for reduced in reduced_parts:
        output = added(output, _reduced_product(multiply, x, layout, reduced, geometry))
    for update in others:
        output = added(output, update_product(multiply, x, weight, layout, update))
    return output


def update_product(
    multiply: Product, x: Tensor, weight: Tensor, layout: Layout, update: Update
) -> Tensor:
    """Return the product of x with s dW of one update, with its dropout."""
    geometry = layout.geometry(weight.shape)
    reduced_parts = reduced_updates([update], layout, geometry)
    if reduced_parts:
        return _reduced_product(multiply, x, layout, reduced_parts[0], geometry)
    rows = update.rows if layout.pattern == "out in" else ()  # then the product has only these
    looks_up = not x.is_floating_point()
    if update.dropout and not looks_up:
        x = F.dropout(x, update.dropout)
    if multiply is F.linear and layout == MATRIX and not rows:
        output = _update_alone(x, weight, update)
        if output is not None:
            return output
    apart = update.replace(rows=() if rows else update.rows)
    delta = scaled(apart.delta_weight(layout, layout.part(weight, rows)), update.scale)
    row_numbers = [torch.arange(*ends, device=x.device) for ends in rows]
    if looks_up:  # x has indices
        if rows:
            # (..., 1 + rows); all other indices look up a row of zeros, the first one.
            is_row = x.unsqueeze(-1) == torch.cat([x.new_full((1,), -1), *row_numbers])
            output = F.embedding(is_row.int().argmax(-1), F.pad(delta, (0, 0, 1, 0)))
        else:
            output = multiply(x, delta.to(weight.dtype), None)
        return _dropped_tokens(output, update.dropout)
    output = multiply(x, delta.to(x.dtype), None)
    if rows:
        whole = output.new_zeros((*output.shape[:-1], geometry.out_features))
        output = whole.index_add_(-1, torch.cat(row_numbers), output)
    return output


def _update_alone(x: Tensor, weight: Tensor, update: Update) -> Tensor | None:
    """Return s dW x of a linear layer if the method computes it without dW, or None."""
    method, block, scale, *_ = update
    rows = x.reshape(-1, x.shape[-1])
    output = method.product(rows, weight.to(x.dtype), None, block, scale, share=0.0)
    return None if output is None else output.view(*x.shape[:-1], weight.shape[0])


def _reduced_product(
    multiply: Product, x: Tensor, layout: Layout, reduced: Reduced, geometry: Geometry
) -> Tensor:
    """Return s S(x) R: the product of the shard sums with a smaller weight of the same layout."""
    matrix, dropout, chosen = reduced
    r = matrix.shape[-2]
    out_features = geometry.out_features
    looks_up = not x.is_floating_point()
    if not looks_up:
        x = F.dropout(x, dropout) if dropout else x
        matrix = matrix.to(x.dtype)
    # So it is for a table in a linear product, and for a linear weight in a lookup.
    is_transposed = layout.in_first != looks_up and len(layout.axes) == 2
    if is_transposed:
        # The product is x R^T, repeated over the shards of the inputs.
        delta = multiply(x, layout.weight(tiled(matrix, out_features).mT), None)  # (..., r)
        delta = tiled(delta, shard_count(geometry.in_features, r) * r)[..., : geometry.in_features]
        if layout.padding_idx is not None:
            delta[..., layout.padding_idx] = 0.0
        return _dropped_tokens(delta, dropout if looks_up else 0.0)
    if looks_up:
        delta = embedding_delta(x, matrix, out_features, padding_idx=layout.padding_idx)
        return _dropped_tokens(delta, dropout)
    # A linear tile is repeated after the product, so backward keeps nothing of the larger size.
    matrix = matrix if multiply is F.linear else tiled(matrix, out_features)
    dim = -1
    if layout.has_kernel:  # x is (..., channels, *positions), with a position for each kernel axis
        kernel = geometry.stack[1:] if layout.in_first else geometry.stack  # without the groups
        dim -= len(kernel)
    groups = x.shape[dim] // geometry.in_features  # of a convolution: each has its own inputs
    if groups > 1:
        x = torch.unflatten(x, dim, (groups, -1))
    sums, regain = shard_sums(x, r, dim)
    if groups > 1:
        sums = torch.flatten(sums, dim - 1, dim)

    def product(sums: Tensor, matrix: Tensor) -> Tensor:
        chosen_matrix = matrix if chosen is None else matrix[chosen]
        return multiply(sums, layout.weight(chosen_matrix.mT), None)

    if chosen is None or is_compiling() or must_not_write():
        output = product(sums, matrix)
    else:  # backward gathers again, so it does not keep one matrix for each token
        output = checkpoint(product, sums, matrix, use_reentrant=False, preserve_rng_state=False)
    output = scaled(output, regain)
    return tiled(output, out_features) if multiply is F.linear else output


def _dropped_tokens(output: Tensor, dropout: float) -> Tensor:
    """Drop all of the update of some tokens: the effect of dropout on a lookup's one-hot input."""
    return output * F.dropout(torch.ones_like(output[..., :1]), dropout) if dropout else output


def _divided(
    updates: Sequence[Update], layout: Layout, geometry: Geometry
) -> tuple[list[Reduced], list[Update], list[Update]]:
    """Return the updates that use shard sums, are folded into W, or need their own product."""
    dense = [update for update in updates if not update.method.reduces]
    folded = [update for update in dense if not update.is_apart()]
    others = [update for update in dense if update.is_apart()]
    return reduced_updates(updates, layout, geometry), folded, others


def reduced_updates(updates: Sequence[Update], layout: Layout, geometry: Geometry) -> list[Reduced]:
    """Return what the updates add through shard sums; those of one shard size are added up."""
    found: dict[Hashable, Reduced] = {}
    out_features = geometry.out_features
    for update in updates:
        if not update.method.reduces:
            continue
        method = update.method
        block = update.block
        inputs, outputs, stack = geometry
        if update.rows:
            outputs = sum([stop - first for first, stop in update.rows])
        if update.chosen is not None:
            stack = method.stack_of(layout, block.shape)  # the weight has only the chosen matrices
        block_geometry = Geometry(inputs, outputs, stack)
        matrix = method.reduced(method.matrix_block(layout, block), block_geometry, update.r)
        if update.rows:
            matrix = tiled(matrix, outputs)
            matrix = place_rows(matrix, update.rows, out_features, dim=-1)
        reduced = Reduced(scaled(matrix, update.scale), update.dropout, update.chosen)
        alone = reduced.dropout or reduced.chosen is not None
        # A number is a key that no other has.
        key = (len(found),) if alone else (matrix.shape[-2], matrix.dtype)
        if key in found:
            pair = [tiled(term.matrix, out_features) for term in (found[key], reduced)]
            reduced = Reduced(pair[0] + pair[1], 0.0)
        found[key] = reduced
    return list(found.values())


def updates_of_rows(
    updates: Sequence[Update], start: int, stop: int, geometry: Geometry, everywhere: bool = False
) -> list[Update] | None:
    """Return the updates of the outputs start to stop, or None if a block can't be cut there.

    Those of none of these outputs are left out, or empty if they must be `everywhere`.
    """
    found = []
    for update in updates:
        rows = update.rows or ((0, geometry.out_features),)
        # How many of a block's outputs stand before each of these edges.
        first, last, outputs = [
            sum(min(edge, end) - min(edge, begin) for begin, end in rows)
            for edge in (start, stop, geometry.out_features)
        ]
        if first == last:
            if not everywhere:
                continue
            first = last = 0  # there, an empty block can be cut whatever r is
        block_geometry = Geometry(geometry.in_features, outputs, geometry.stack)
        block = update.method.of_outputs(update.block, first, last, block_geometry, update.r)
        if block is None:
            return None
        inside = [
            (max(begin, start) - start, min(end, stop) - start)
            for begin, end in rows
            if begin < stop and start < end
        ]
        has_all = last - first == stop - start
        kept_rows = () if has_all else tuple(inside or [(0, 0)])
        found.append(update.replace(block=block, rows=kept_rows))
    return found


def update_of_part(
    update: Update, layout: Layout, shape: Sequence[int], part: Sequence[tuple[int, int]]
) -> list[Update] | None:
    """Return the updates of a part of a weight, or None if a block can't be cut there."""
    whole = [(0, size) for size in shape]
    if layout.has_kernel:
        return [update] if list(part) == whole else None
    axes = zip(layout.axes, part, whole, strict=True)
    cut = {
        axis: part_of_axis for axis, part_of_axis, all_of_it in axes if part_of_axis != all_of_it
    }
    if "expert" in cut:
        update = update.select_matrices(slice(*cut["expert"]))
    geometry = layout.geometry(shape)
    for axis in cut.keys() & {"in", "index"}:
        block = update.method.of_inputs(update.block, *cut[axis], geometry, update.r)
        if block is None:
            return None
        update = update.replace(block=block)
    if "out" not in cut:
        return [update]
    # A rank that has none of the rows takes part in the sum of their gradients too.
    return updates_of_rows([update], *cut["out"], geometry, everywhere=True)


# --- one matrix ----------------------------------------------------------------------------------


def adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[Update]
) -> Tensor:
    """Return (W + sum of s dW) x + b, as cheaply as the methods allow.

    Args:
        x: input (..., in).
        weight: W (out, in).
        bias: b (out,), or None.
        updates: the blocks.

    Returns:
        Tensor (..., out), in the dtype that the plain linear layer returns.

    Examples:
        >>> import torch
        >>> from disha.functional import Update, adapted_linear, method_of
        >>> bone, bat = torch.ones(1, 2), torch.eye(2)[None]
        >>> updates = [Update(method_of("bone"), bone), Update(method_of("bat"), bat, 0.5)]
        >>> adapted_linear(torch.ones(2), torch.eye(2), None, updates)
        tensor([4., 4.])
    """
    late = None
    if x.dim() > 2 and bias is not None and not is_compiling() and not x.is_contiguous():
        # For such an input, torch adds the bias after the product, which can round differently.
        late = bias
        bias = None
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    # Almost every layer has one update of all outputs, so this case has a fast path.
    if len(updates) != 1 or updates[0].rows or updates[0].dropout:
        output = _linear_in_general(rows, weight, bias, updates)
    elif updates[0].method.reduces:
        output = _linear_and_reduced(rows, weight, bias, updates[0])
    else:
        output = _folded_alone(rows, weight, bias, updates[0])
    if late is not None:
        output = added(output, late)
    return output if rows is x else output.reshape(*x.shape[:-1], weight.shape[0])


def _linear_and_reduced(x: Tensor, weight: Tensor, bias: Tensor | None, update: Update) -> Tensor:
    """Return W x + b + s S(x) R for x (n, in), with one update of all outputs."""
    tokens, inputs = x.shape
    outputs = weight.shape[0]
    scale = update.scale
    matrix = update.method.reduced(update.block, Geometry(inputs, outputs), update.r)
    r, columns = matrix.shape
    if x.dtype == torch.float16 or any_autocast():
        sums, factor = shard_sums(x, r)
        return _plus_product(F.linear(x, weight, bias), sums, scaled(matrix, scale), factor)
    if isinstance(scale, Tensor):  # in compiled code, where s and the sum become one loop
        sums = shard_sum(x * scale, r)
        return _plus_product(F.linear(x, weight, bias), sums, matrix, 1.0)
    if inputs % r:
        return _plus_product(F.linear(x, weight, bias), shard_sum(x, r), matrix, scale)
    shards = x.view(tokens, inputs // r, r)
    sums = shards.sum(1)
    if x.requires_grad:
        # W x and S(x) read the same view. So in backward, the gradient of S(x) is added to that of
        # W x as it is, and not repeated in memory first.
        x = shards.view(tokens, inputs)
    output = F.linear(x, weight, bias)
    if matrix.dtype != x.dtype or columns != outputs or transforms_active() or modes_active():
        return _plus_product(output, sums, matrix, scale)
    return output.addmm_(sums, matrix, alpha=scale)  # here, to save a call for few tokens


def _linear_in_general(
    x: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[Update]
) -> Tensor:
    """Return (W + sum of s dW) x + b for any updates and x (n, in)."""
    reduced_parts, folded, others = _divided(updates, MATRIX, MATRIX.geometry(weight.shape))
    # The updates are computed before W x. So in backward, W x creates the gradient of x, and the
    # updates add to it.
    sums = []
    for matrix, dropout, _ in reduced_parts:
        dropped = F.dropout(x, dropout) if dropout else x
        sums.append((*shard_sums(dropped, matrix.shape[0]), matrix))
    deltas = [update_product(F.linear, x, weight, MATRIX, update) for update in others]
    output = _folded(x, weight, bias, folded) if folded else F.linear(x, weight, bias)
    for summed, regain, matrix in sums:
        output = _plus_product(output, summed, matrix, regain)
    return reduce(added, deltas, output)


def _plus_product(output: Tensor, sums: Tensor, matrix: Tensor, factor: float) -> Tensor:
    """Return output + sums @ matrix * factor, in one operation where possible."""
    matrix = matrix.to(sums.dtype)
    if output.dtype != sums.dtype or matrix.shape[1] != output.shape[1]:
        return added(output, tiled(scaled(sums @ matrix, factor), output.shape[1]))
    if is_compiling() or must_not_write():
        return torch.addmm(output, sums, matrix, alpha=factor)
    return output.addmm_(sums, matrix, alpha=factor)


def _folded(x: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[Update]) -> Tensor:
    """Return the product with the updates folded into W."""
    first = updates[0]
    kinds = [
        (update.method, update.block.shape, update.block.dtype, update.rows) for update in updates
    ]
    alike = all(kind == kinds[0] for kind in kinds)
    if len(updates) > 1 and alike and first.method.additive:
        blocks = [scaled(update.block, update.scale) for update in updates]
        updates = [first.replace(block=reduce(torch.add, blocks), scale=1.0)]
    if len(updates) == 1 and not first.rows:
        return _folded_alone(x, weight, bias, updates[0])
    pieces = None
    # An empty block, of rows that are on other ranks, gets its gradient from the computed weight.
    has_rows = any(update.rows for update in updates)
    if has_rows and all(update.block.numel() for update in updates):
        pieces = _in_pieces(x, weight, bias, updates)
    if pieces is None:
        return F.linear(x, computed_weight(weight, MATRIX, updates), bias)
    return torch.cat(pieces, -1)


def _folded_alone(x: Tensor, weight: Tensor, bias: Tensor | None, update: Update) -> Tensor:
    """Return the product with one update of all outputs folded into W."""
    method, block, scale, *_ = update
    output = method.product(x, weight, bias, block, scale)
    if output is not None:
        return output
    return F.linear(x, computed_weight(weight, MATRIX, [update]), bias)


def _in_pieces(
    x: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[Update]
) -> list[Tensor] | None:
    """Return a product for each piece of W between the edges of rows; None if they cut a block."""
    size = weight.shape[0]
    edges = {0, size, *(edge for update in updates for ends in update.rows for edge in ends)}
    pieces = []
    for start, stop in pairwise(sorted(edges)):
        updates_here = updates_of_rows(updates, start, stop, MATRIX.geometry(weight.shape))
        if updates_here is None:
            return None
        offset = None if bias is None else bias[start:stop]
        pieces.append(adapted_linear(x, weight[start:stop], offset, updates_here))
    return pieces


# --- stacks of matrices --------------------------------------------------------------------------


def adapted_stack(x: Tensor, weight: Tensor, updates: Sequence[Update]) -> Tensor:
    """Return x (W + sum of s dW)^T for a stack of matrices, each with its own part of x."""
    folds = any(not update.method.reduces and not update.dropout for update in updates)
    if folds and x.shape[0] == 1:
        x = x.expand(weight.shape[0], -1, -1)
    one_input_each = folds and 0 < x.shape[0] == weight.shape[0]
    if one_input_each and len(updates) == 1 and not updates[0].rows:
        method, _, scale, *_ = updates[0]
        output = method.product(x, weight, None, updates[0].chosen_block(), scale)
        if output is not None:
            return output
    if one_input_each and not is_compiling():
        # One matrix at a time saves no dense weight for backward.
        each = zip(*(update.unstack() for update in updates))
        parts = zip(x.unbind(0), weight.unbind(0), each)
        return torch.stack(
            [
                adapted_linear(inputs, matrix, None, matrix_updates)
                for inputs, matrix, matrix_updates in parts
            ]
        )

    def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.matmul(x, weight.mT)

    return adapted_product(multiply, x, weight, None, STACK, updates)


def adapted_grouped(
    multiply: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    updates: Sequence[Update],
) -> Tensor:
    """Return x (W_e + sum of s dW_e)^T, where each run of rows of x belongs to one matrix e.

    One shard sum serves all matrices, and one grouped product adds an update to all rows.
    """
    if not is_compiling() and not all(update.method.reduces for update in updates):
        return _one_by_one(x, weight, offsets, updates)

    def grouped(inputs: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
        if matrices is not weight:
            # The product requires one dtype and rows of a multiple of 16 bytes, so r is padded.
            step = 16 // x.element_size()
            inputs = pad_to_multiple(inputs, step, dim=-1)
            matrices = pad_to_multiple(matrices, step, dim=-1).contiguous()
        return multiply(inputs, torch.transpose(matrices, -2, -1), offs=offsets)

    return adapted_product(grouped, x, weight, None, STACK, updates)


def _one_by_one(x: Tensor, weight: Tensor, offsets: Tensor, updates: Sequence[Update]) -> Tensor:
    """Return the grouped product, computed by one product for each matrix that has rows."""
    outputs = []
    start = 0
    each = list(zip(*(update.unstack() for update in updates)))
    with without_autocast(x.device):  # autocast leaves grouped products alone
        for index, end in enumerate(offsets.tolist()):
            if end > start or not x.shape[0]:
                outputs.append(adapted_linear(x[start:end], weight[index], None, each[index]))
            start = end
    if start < x.shape[0]:  # rows of no matrix
        like = outputs[0] if outputs else x  # under autocast, of another dtype than x
        outputs.append(like.new_zeros(x.shape[0] - start, weight.shape[-2]))
    return torch.cat(outputs)
