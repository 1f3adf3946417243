"""Products: W's own product plus that of the updates, with dropout and the route of the samples."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from disha import functional
from disha.effective.rules import RULES, Operation, rule, rule_with_operation
from disha.effective.views import is_index, select_item, transpose_matrices
from disha.effective.weight import EffectiveWeight, compute_first
from disha.private_torch import GROUPED


@rule(F.linear)
def multiply_linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(input, EffectiveWeight) or isinstance(bias, EffectiveWeight):
        return NotImplemented
    if not isinstance(weight, EffectiveWeight):
        return NotImplemented
    if input.layout is not torch.strided:
        return NotImplemented  # it is nested or sparse
    base = weight.base
    layout = weight.weight_layout
    if layout.pattern == "out in":
        return weight.updates.linear(input, base, bias)
    if base.dim() != 2:
        return NotImplemented
    # It may be a table, to which an output head is tied.
    return weight.updates.product(F.linear, input, base, bias, layout)


# With ZeRO-3, DeepSpeed replaces F.linear by a function of its own.
RULES["LinearFunctionForZeroStage3"] = multiply_linear


@rule("matmul __matmul__")
def _matmul(input: Any, other: Any) -> Any:
    """Multiply x @ W for a weight whose inputs come first, or W @ x if they come last."""
    if isinstance(input, EffectiveWeight):
        if isinstance(other, EffectiveWeight):
            return NotImplemented
        return _multiply_weight_first(input, other)
    matrices = transpose_matrices(other)
    if matrices is NotImplemented:
        return NotImplemented
    if other.base.dim() == 2:
        return multiply_linear(input, matrices)
    if input.layout is not torch.strided:
        return NotImplemented
    updates = other.updates.shared
    if other.weight_layout.pattern == "expert in out" and input.dim() == 3 and updates is not None:
        return functional.adapted_stack(input, matrices.base, updates)
    return NotImplemented


_DIMS_OF_OPERANDS = {"mm": [2, 2], "bmm": [3, 3], "mv": [2, 1]}


@rule_with_operation("mm bmm mv")
def _mm(func: Operation, input: Any, *other: Any, **named: Any) -> Any:
    operands = [input, *other, *named.values()]  # the second one is `mat2` or `vec`
    dims = [operand.dim() for operand in operands]
    has_one_stack = input.shape[:-2] == operands[-1].shape[:-2]
    if dims != _DIMS_OF_OPERANDS[func.__name__] or not has_one_stack:
        return NotImplemented  # torch raises: unlike `matmul`, these do not broadcast
    return _matmul(*operands)


def _multiply_weight_first(weight: EffectiveWeight, x: Tensor) -> Any:
    """Return W @ x for a matrix (out, in) or a stack of them, and x (..., in, n); or for a vector.

    The functional's products take (..., n, in), so both x and the result are transposed.
    """
    layout = weight.weight_layout
    base = weight.base
    updates = weight.updates.shared
    is_matrix = layout.pattern == "out in"
    is_stack = layout.pattern == "expert out in" and x.dim() == 3
    if is_matrix and x.dim() == 1:
        return multiply_linear(x, weight)
    if not (is_matrix or is_stack) or weight.updates.is_routed or x.layout is not torch.strided:
        return NotImplemented
    if updates is not None and all(update.method.low_rank for update in updates):

        def multiply(inputs: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
            return torch.matmul(matrix, inputs.mT).mT

        return functional.adapted_product(multiply, x.mT, base, None, layout, updates).mT
    return _matmul(x.mT, transpose_matrices(weight)).mT


@rule("addmm")
def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if not isinstance(mat2, EffectiveWeight):
        return NotImplemented
    if input.dim() != 1 or (beta, alpha) != (1, 1):
        return NotImplemented
    matrix = transpose_matrices(mat2)
    if matrix is NotImplemented:
        return NotImplemented
    return multiply_linear(mat1, matrix, input)


@rule_with_operation(GROUPED)
def _grouped(
    multiply: Operation, input: Any, weight: Any = None, offs: Any = None, *more: Any, **named: Any
) -> Any:
    if not isinstance(weight, EffectiveWeight) or isinstance(input, EffectiveWeight):
        return NotImplemented
    updates = weight.updates.shared
    if weight.weight_layout.pattern != "expert in out" or updates is None:
        return NotImplemented
    if more or any(value is not None for value in named.values()) or offs is None:
        return NotImplemented
    return functional.adapted_grouped(
        multiply, input, transpose_matrices(weight).base, offs, updates
    )


def _grouped_of_transformers(*args: Any, **kwargs: Any) -> Tensor:
    return torch.ops.transformers.grouped_mm_fallback(*args, **kwargs)


# It is listed by its name, because it exists only after transformers is imported.
RULES["transformers::grouped_mm_fallback"] = partial(_grouped, _grouped_of_transformers)


_TRANSPOSED_CONVS = F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d

_GROUPS = 3
"""Position of `groups` after the bias: behind stride, padding, and dilation or output_padding."""


@rule_with_operation(F.conv1d, F.conv2d, F.conv3d, *_TRANSPOSED_CONVS)
def _conv(
    func: Operation, input: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any
) -> Any:
    if isinstance(input, EffectiveWeight) or isinstance(bias, EffectiveWeight):
        return NotImplemented
    if not isinstance(weight, EffectiveWeight) or not weight.weight_layout.has_kernel:
        return NotImplemented
    layout = weight.weight_layout
    transposes = func in _TRANSPOSED_CONVS
    groups = args[_GROUPS] if len(args) > _GROUPS else kwargs.get("groups", 1)
    if layout.in_first != transposes or (transposes and groups != layout.groups):
        return NotImplemented

    def convolve(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return func(x, w, b, *args, **kwargs)

    return weight.updates.product(convolve, input, weight.base, bias, layout)


@rule(F.embedding)
def _embedding(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if not isinstance(weight, EffectiveWeight) or weight.base.dim() != 2:
        return NotImplemented
    changes_table = scale_grad_by_freq or max_norm is not None
    if input.layout is not torch.strided or changes_table:
        # `max_norm` changes rows of the table, and `scale_grad_by_freq` its gradient. Torch does
        # this to the computed weight, whose gradient is dense, so `sparse` is left out.
        args = (input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq)
        return compute_first(F.embedding, args, {})

    def look_up(indices: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
        is_sparse = sparse and table is weight.base  # a computed weight needs a dense gradient
        return F.embedding(indices, table, padding_idx, sparse=is_sparse)

    layout = weight.weight_layout
    output = weight.updates.product(look_up, input, weight.base, None, layout)
    if padding_idx is None or padding_idx == layout.padding_idx:
        return output
    # A layout with this padding_idx gives the row no update. In any other, the row has one, as in
    # the merged table, but torch gives it no gradient.
    is_padding = (input == padding_idx % weight.base.shape[0]).unsqueeze(-1)
    return torch.where(is_padding, output.detach(), output)


@rule(Tensor.__getitem__)
def _item(weight: Any, index: Any) -> Any:
    """Look rows of a table up, or view a part of the weight."""
    if weight.base.dim() == 2 and isinstance(index, Tensor) and is_index(index):
        # An index may count from the end, and a lookup may not.
        return _embedding(torch.where(index < 0, index + weight.base.shape[0], index), weight)
    return select_item(weight, index)


_SPARSE = 7
"""Position of `sparse` in `F.embedding_bag`."""


@rule(F.embedding_bag)
def _embedding_bag(input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    # The computed weight needs a dense gradient.
    given = [input, weight, *args]
    if len(given) > _SPARSE:
        given[_SPARSE] = False
    else:
        kwargs["sparse"] = False
    return compute_first(F.embedding_bag, tuple(given), kwargs)
