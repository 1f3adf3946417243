"""The effective weight: a tensor that stands for W + sum of s dW without computing it.

Reading an adapted parameter gives one. What each operation does with it:

    facts      shape, dtype, new_zeros, ones_like ... those of W; nothing is computed
    views      transposes, rows, items of a stack     an effective weight
    products   linear, matmul, conv, embedding ...    W's own product plus the updates'
    attention  F.multi_head_attention_forward         its projections are such products
    writes     copy_, __setitem__, nn.init ...        done to W; the result is effective again
    the rest   einsum, norm, arithmetic ...           W + sum of s dW is computed, with its graph

Each rule stands below, in this order, under the operations that it is for.

An effective weight is an alias of W with a few more attributes. Code that does not go through
`__torch_function__` sees only W. So a rule must never pass the effective weight on to torch, but
use `base` and `updates` itself. In compiled code, a rule is not dispatched again inside a rule.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType, GetSetDescriptorType, ModuleType
from typing import Any, TypeAlias, TypeVar

import torch
import torch._C._dynamo.eval_frame as _frames
import torch.nn.functional as F
from torch import Tensor

from disha import functional
from disha.errors import ArgumentError, ModeError
from disha.functional import Layout, Update, adapted_linear
from disha.functional.products import Product, update_of_part, updates_of_rows
from disha.routing import Routed, routed_linear, routed_product
from disha.sharding import Split

PLAIN = (Tensor, torch.nn.Parameter)
"""The classes of weights that an effective weight can be an alias of."""


class EffectiveWeight(Tensor):
    """W + sum of s dW, not computed: an alias of W that carries the updates."""

    base: Tensor
    axes: Layout  # in torch, the attribute `layout` has another meaning
    updates: tuple[Update, ...]  # of all samples
    routed: Routed | None  # those of single samples

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation by its rule."""
        own = RULES.get(func) or RULES.get(getattr(func, "_qualified_op_name", None))
        if own is not None and kwargs and not args and "input" in kwargs:
            # So torch calls the first argument of all functions that have a rule.
            args = (kwargs["input"],)
            kwargs = {name: value for name, value in kwargs.items() if name != "input"}
        if own is not None and kwargs and "out" in kwargs:
            _refuse_to_lose_gradients(args, kwargs)
        elif own is not None:
            result = own(*args, **kwargs) if kwargs else own(*args)
            if result is not NotImplemented:
                return result
        return _compute_first(func, args, kwargs or {})

    def as_subclass(self, cls: Any) -> Any:
        """Return the computed weight as a tensor of another class."""
        return computed(self).as_subclass(cls)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return computed(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    @property
    def _is_param(self) -> bool:
        """Whether it is a parameter; `nn.Parameter` sets this."""
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        raise ArgumentError(
            f"a parameter can't be made of an adapted weight (of shape {tuple(self.shape)}), "
            "because it would hide the adapters; make it of weight.clone(), the computed weight, "
            "or of layer.base_weight"
        )


class AbsentWeight(EffectiveWeight):
    """An effective weight whose W is on the meta device and whose blocks are not: only facts."""

    @property
    def updates(self) -> tuple[Update, ...]:  # type: ignore[override]
        """Raise: a product with W would be uninitialised memory."""
        raise ModeError(
            "an adapted weight is on the meta device, where it has no values, and its block is "
            "not; give the model its weights first. If accelerate has offloaded it, only the "
            "forward of its own module loads it: preload the module that reads it "
            "(preload_module_classes), or keep it on a device"
        )


def start_no_graph(function: Any) -> None:
    """Keep the compiler from starting a graph at a function of ours, or at one that it calls."""
    skip = _frames._FrameAction.SKIP
    _frames.set_code_exec_strategy(function.__code__, _frames._FrameExecStrategy(skip, skip))


# An effective weight can't be the input of a graph.
start_no_graph(vars(EffectiveWeight)["__torch_function__"].__func__)


def effective(
    base: Tensor,
    layout: Layout,
    updates: tuple[Update, ...],
    routed: Routed | None = None,
) -> EffectiveWeight:
    """Return the effective weight of W, with its layout and updates."""
    weight: Any = base.as_subclass(EffectiveWeight)
    weight.base = base
    weight.axes = layout
    weight.updates = updates
    weight.routed = routed
    return weight  # type: ignore[no-any-return]


def computed(weight: EffectiveWeight) -> Tensor:
    """Return W + sum of s dW as a plain tensor, with its graph."""
    if weight.routed is not None:
        raise ModeError(
            "samples can't be routed here: this operation needs one computed weight for all "
            "samples; use one adapter at a time, or exclude the weight"
        )
    if any(update.dropout for update in weight.updates):
        raise ModeError(
            "the adapter's dropout can't act here: it drops inputs, and this operation needs a "
            "computed weight; use dropout=0, or exclude the weight"
        )
    return functional.effective_weight(weight.base, weight.axes, weight.updates)


def effective_part(
    local: Tensor, split: Split, layout: Layout, updates: Sequence[Update]
) -> EffectiveWeight:
    """Return the effective weight of this rank's part of a weight with these updates."""
    own: list[Update] = []
    for update in updates:
        if update.dropout:
            raise ModeError(
                "the adapter's dropout can't act here: each rank would drop different inputs of a "
                "tensor-parallel weight; use dropout=0"
            )
        update = update._replace(block=split.summed(update.block))
        some = update_of_part(update, layout, split.shape, split.part)
        if some is None:
            raise ModeError(
                f"an adapter can't act: its weight is placed as {split.placements}, and its block "
                "can't be cut in the same way; inject after the weight is placed"
            )
        own += some
    return effective(local, layout.of_part(split.part), tuple(own))


def _compute_first(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Run an operation with the computed weight. If `out=` is the weight, it writes into W."""
    named = {
        name: _base_of(value) if name == "out" else computed_inside(value)
        for name, value in kwargs.items()
    }
    result = func(*(computed_inside(value) for value in args), **named)
    return kwargs["out"] if isinstance(kwargs.get("out"), EffectiveWeight) else result


def computed_inside(value: Any) -> Any:
    """Return a value with the effective weights in it computed."""
    if isinstance(value, EffectiveWeight):
        return computed(value)
    if type(value) in (list, tuple):
        return type(value)([computed_inside(one) for one in value])
    if type(value) is dict:
        return {key: computed_inside(one) for key, one in value.items()}
    return value


def _base_of(value: Any) -> Any:
    if isinstance(value, EffectiveWeight):
        return value.base
    return type(value)(map(_base_of, value)) if type(value) in (list, tuple) else value


def _refuse_to_lose_gradients(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise if a product that trains goes into `out=`, without gradients (losses of trl do so)."""
    operands = [*args, *(value for name, value in kwargs.items() if name != "out")]
    for one in operands:
        if isinstance(one, EffectiveWeight) and any(up.block.requires_grad for up in one.updates):
            raise ModeError(
                f"a product with an adapted weight of shape {tuple(one.shape)} can't go into out=, "
                "because its block would get no gradient. If a trainer computes its loss from the "
                "weight of the output head, as those of trl do, leave the head out "
                "(exclude='lm_head'); in your own code, use weight.clone()"
            )


# --- rules ---------------------------------------------------------------------------------------

Rule: TypeAlias = Callable[..., Any]
"""What to do in place of an operation, with the same arguments. NotImplemented: compute first."""

RULES: dict[Any, Rule] = {}
"""Operation -> its rule; a later one replaces an earlier. One of another library has its name."""

R = TypeVar("R", bound=Rule)


def _operations(named: Sequence[Any]) -> Iterator[Any]:
    """Yield operations; names stand for those of tensors and of torch that this version has."""
    for one in named:
        if not isinstance(one, str):
            yield one
            continue
        for name in one.split():
            for owner in (Tensor, torch):
                found = getattr(owner, name, None)
                if found is not None:
                    yield found.__get__ if isinstance(found, GetSetDescriptorType) else found


def rule(*operations: Any) -> Callable[[R], R]:
    """Make a function the rule of operations."""

    def register(function: R) -> R:
        RULES.update(dict.fromkeys(_operations(operations), function))
        return function

    return register


def rules(*operations: Any) -> Callable[[R], R]:
    """Make what a function returns for each operation the rule of that operation."""

    def register(make: R) -> R:
        RULES.update({func: make(func) for func in _operations(operations)})
        return make

    return register


# --- facts ---------------------------------------------------------------------------------------

_PROPERTIES = " ".join(
    name
    for name in dir(Tensor)
    if isinstance(getattr(Tensor, name), GetSetDescriptorType) and not name.startswith("__")
)


@rules(
    _PROPERTIES,
    "dim size stride numel nelement ndimension element_size is_floating_point is_complex is_signed "
    "is_contiguous is_inference is_conj is_neg is_pinned is_shared get_device storage_offset "
    "dim_order __len__ __hash__ is_coalesced has_names _is_view is_same_size result_type "
    "register_hook register_post_accumulate_grad_hook retain_grad",
)
def _ask_base(func: Callable[..., Any]) -> Rule:
    def ask(weight: Any, *args: Any, **kwargs: Any) -> Any:
        return func(_base_of(weight), *map(_base_of, args), **kwargs)

    return ask


@rule("H mH real imag")
def _computes(*args: Any) -> Any:
    return NotImplemented


@rules(" ".join(name for name in dir(torch) if name.endswith("_like")))
@rules(" ".join(name for name in dir(Tensor) if name.startswith("new_")))
def _create(func: Callable[..., Any]) -> Rule:
    """Make a tensor like the first argument. The others are values."""

    def create(like: Any, *args: Any, **kwargs: Any) -> Any:
        return _compute_first(func, (_base_of(like), *args), kwargs)

    return create


@rule(Tensor.data_ptr)
def _data_ptr(weight: Any) -> int:
    # Kept as long as the weight lives, because the caller uses the address after the call.
    weight.addressed = computed(weight)
    return weight.addressed.data_ptr()  # type: ignore[no-any-return]


@rule(torch.autograd.grad)
def _gradients(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """The gradient of a weight is that of W."""
    return _compute_first(torch.autograd.grad, (outputs, _base_of(inputs), *args), kwargs)


# --- views ---------------------------------------------------------------------------------------


def _mapped(
    weight: EffectiveWeight,
    base: Tensor,
    layout: Layout,
    change: Callable[[Sequence[Update]], Sequence[Update] | None],
) -> Any:
    """Return a view with its updates changed; NotImplemented if `change` returns None."""
    updates, routed = change(weight.updates), weight.routed
    if updates is None:
        return NotImplemented
    if routed is not None:
        own = {adapter: change(some) for adapter, some in routed.updates.items()}
        kept = {adapter: tuple(some) for adapter, some in own.items() if some is not None}
        if len(kept) < len(own):
            return NotImplemented
        routed = routed._replace(updates=kept)
    return effective(base, layout, tuple(updates), routed) if updates or routed else base


@rule("mT")
def _turned(weight: Any) -> Any:
    layout = weight.axes.turned()
    if layout is None:
        return NotImplemented
    return effective(torch.transpose(weight.base, -2, -1), layout, weight.updates, weight.routed)


@rule("t T")
def _t(weight: Any) -> Any:
    return _turned(weight) if weight.base.dim() == 2 else NotImplemented


@rule("transpose swapdims swapaxes")
def _transpose(weight: Any, *dims: int, **named: int) -> Any:
    ndim = weight.base.dim()
    swapped = {dim % ndim for dim in (*dims, *named.values())}
    return _turned(weight) if swapped == {ndim - 2, ndim - 1} else NotImplemented


_INDEX_DTYPES = (torch.int64, torch.int32)
"""The dtypes of a tensor of indices. To torch, uint8 and bool are masks."""


@rule(Tensor.__getitem__)
def _item(weight: Any, index: Any) -> Any:
    """Return one or several matrices of a stack, rows of a matrix, or looked-up rows."""
    layout, base = weight.axes, weight.base
    if isinstance(index, Tensor):
        counts = index.dtype in _INDEX_DTYPES and not isinstance(index, EffectiveWeight)
    else:
        counts = isinstance(index, int) and not isinstance(index, bool)
    if layout.expert_dim == 0 and counts:
        one = isinstance(index, int) or index.dim() == 0
        if not one and index.dim() != 1:
            return NotImplemented
        item = layout.of_one_expert() if one else layout
        return _mapped(weight, base[index], item, lambda own: [one.at(index) for one in own])
    if layout.expert_dim == 0 and isinstance(index, slice):
        return _mapped(weight, base[index], layout, lambda own: [one.at(index) for one in own])
    if layout.pattern == "index out" and isinstance(index, Tensor) and counts:
        # Unlike a lookup, an index may count from the end.
        return _embedding(torch.where(index < 0, index + base.shape[0], index), weight)
    if layout.pattern == "out in" and isinstance(index, slice):
        start, stop, step = index.indices(base.shape[0])
        return _rows(weight, start, stop) if step == 1 and stop > start else NotImplemented
    return NotImplemented


def _rows(weight: Any, start: int, stop: int) -> Any:
    """Return the effective weight of some rows of a matrix (out, in)."""
    size = weight.base.shape[0]

    def of_rows(updates: Sequence[Update]) -> Sequence[Update] | None:
        return updates_of_rows(updates, start, stop, size)

    return _mapped(weight, weight.base[start:stop], weight.axes, of_rows)


@rule("split")
def _split(weight: Any, split_size: Any, dim: int = 0) -> Any:
    sizes = [part.shape[dim] for part in weight.base.split(split_size, dim)]
    return _in_parts(weight, sizes, dim)


@rule("chunk")
def _chunk(weight: Any, chunks: int, dim: int = 0) -> Any:
    sizes = [part.shape[dim] for part in weight.base.chunk(chunks, dim)]
    return _in_parts(weight, sizes, dim)


def _in_parts(weight: Any, sizes: Sequence[int], dim: int) -> Any:
    if weight.axes.pattern != "out in" or dim not in (0, -2):
        return NotImplemented
    parts, start = [], 0
    for size in sizes:
        parts.append(_rows(weight, start, start + size))
        start += size
    return NotImplemented if any(part is NotImplemented for part in parts) else tuple(parts)


@rule("unbind")
def _unbind(weight: Any, dim: int = 0) -> Any:
    layout = weight.axes
    if dim or layout.expert_dim != 0:
        return NotImplemented
    if weight.routed is not None or not weight.updates:
        return tuple(_item(weight, index) for index in range(weight.base.shape[0]))
    each = zip(*(update.each() for update in weight.updates))
    item, bases = layout.of_one_expert(), weight.base.unbind(0)
    return tuple(effective(base, item, own) for base, own in zip(bases, each))


@rule("index_select select")
def _select(weight: Any, dim: int, index: Any) -> Any:
    return _item(weight, index) if dim == 0 == weight.axes.expert_dim else NotImplemented


@rules("to type type_as float double half bfloat16 contiguous")
def _cast(func: Callable[..., Any]) -> Rule:
    def cast(weight: Any, *args: Any, **kwargs: Any) -> Any:
        named = {name: _base_of(value) for name, value in kwargs.items()}
        base = func(_base_of(weight), *map(_base_of, args), **named)
        if not isinstance(weight, EffectiveWeight) or not isinstance(base, Tensor):
            return base  # another tensor, cast like this weight; or `type()` without arguments
        if not base.is_floating_point() or base.device != weight.base.device:
            return NotImplemented  # the blocks stay on their device
        return effective(base, weight.axes, weight.updates, weight.routed)

    return cast


@rules("detach data")
def _detach(func: Callable[..., Any]) -> Rule:
    def detach(weight: Any) -> Any:
        def detached(updates: Sequence[Update]) -> Sequence[Update]:
            return [update._replace(block=func(update.block)) for update in updates]

        return _mapped(weight, func(weight.base), weight.axes, detached)

    return detach


# --- products ------------------------------------------------------------------------------------


def _is_dense(input: Tensor) -> bool:
    """Whether an input is dense, not sparse. For others, the weight is computed."""
    return input.layout is torch.strided


@rule(F.linear)
def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(input, EffectiveWeight) or isinstance(bias, EffectiveWeight):
        return NotImplemented
    if weight.axes.pattern != "out in" or not _is_dense(input):
        return NotImplemented
    if weight.routed is None:
        return adapted_linear(input, weight.base, bias, weight.updates)
    return routed_linear(input, weight.base, bias, weight.axes, weight.routed)


@rule("matmul __matmul__")
def _matmul(input: Any, other: Any) -> Any:
    """Multiply x @ W for a weight whose inputs come first, or W @ x if they come last."""
    if isinstance(input, EffectiveWeight):
        return NotImplemented if isinstance(other, EffectiveWeight) else _weight_first(input, other)
    if not _is_dense(input):
        return NotImplemented
    turned = _turned(other)
    if other.axes.pattern == "in out":
        return _linear(input, turned)
    if other.axes.pattern == "expert in out" and input.dim() == 3 and other.routed is None:
        return functional.adapted_stack(input, turned.base, turned.updates)
    return NotImplemented


@rule("mm bmm")
def _mm(input: Any, mat2: Any) -> Any:
    return _matmul(input, mat2)


@rule("mv")
def _mv(input: Any, vec: Any) -> Any:
    return _matmul(input, vec)


def _weight_first(weight: EffectiveWeight, x: Tensor) -> Any:
    layout, base, updates = weight.axes, weight.base, weight.updates
    if layout.pattern == "out in" and x.dim() == 1:
        return _linear(x, weight)
    matrix, stack = layout.pattern == "out in", layout.pattern == "expert out in" and x.dim() == 3
    if not (matrix or stack) or weight.routed is not None or not _is_dense(x):
        return NotImplemented
    if all(update.method.reduces for update in updates):

        def multiply(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
            return torch.matmul(w, x.mT)

        return functional.adapted_product(multiply, x.mT, base, None, layout, updates)
    if stack:
        return functional.adapted_stack(x.mT, base, updates).mT
    return adapted_linear(x.mT, base, None, updates).mT


@rule("addmm")
def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if not isinstance(mat2, EffectiveWeight) or mat2.axes.pattern != "in out":
        return NotImplemented
    if isinstance(mat1, EffectiveWeight) or input.dim() != 1 or (beta, alpha) != (1, 1):
        return NotImplemented
    return _linear(mat1, _turned(mat2), input)


@rules(torch._grouped_mm)
def _grouped(multiply: Callable[..., Tensor]) -> Rule:
    def grouped(input: Any, weight: Any, offs: Any = None, *more: Any, **named: Any) -> Any:
        if not isinstance(weight, EffectiveWeight) or isinstance(input, EffectiveWeight):
            return NotImplemented
        if weight.axes.pattern != "expert in out" or weight.routed is not None:
            return NotImplemented
        if more or any(value is not None for value in named.values()) or offs is None:
            return NotImplemented
        turned = _turned(weight)
        return functional.adapted_grouped(multiply, input, turned.base, offs, turned.updates)

    return grouped


def _grouped_of_transformers(*args: Any, **kwargs: Any) -> Tensor:
    product: Tensor = torch.ops.transformers.grouped_mm_fallback(*args, **kwargs)
    return product


# By its name, because it exists only after transformers is imported.
RULES["transformers::grouped_mm_fallback"] = _grouped(_grouped_of_transformers)


def _product(
    multiply: Product,
    input: Any,
    weight: EffectiveWeight,
    bias: Any,
    has_samples: bool,
    groups: int = 1,
) -> Tensor:
    base, layout = weight.base, weight.axes
    if weight.routed is not None:
        return routed_product(
            multiply, input, base, bias, layout, weight.routed, has_samples, groups
        )
    return functional.adapted_product(multiply, input, base, bias, layout, weight.updates, groups)


@rules(F.conv1d, F.conv2d, F.conv3d)
@rules(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def _conv(func: Callable[..., Tensor]) -> Rule:
    def conv(input: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(weight, EffectiveWeight) or not weight.axes.has_kernel:
            return NotImplemented

        def convolve(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            return func(x, w, b, *args, **kwargs)

        # After the bias: stride, padding, then dilation or output_padding, then groups.
        groups = args[3] if len(args) > 3 else kwargs.get("groups", 1)
        return _product(convolve, input, weight, bias, input.dim() == weight.base.dim(), groups)

    return conv


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
    if not isinstance(weight, EffectiveWeight) or weight.axes.pattern != "index out":
        return NotImplemented
    if not _is_dense(input) or scale_grad_by_freq or max_norm is not None:
        # Torch changes the rows, or the gradient, of the computed weight, whose gradient is dense.
        args = (input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq)
        return _compute_first(F.embedding, args, {})

    def look_up(indices: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
        own = sparse and table is weight.base  # a computed weight needs a dense gradient
        return F.embedding(indices, table, padding_idx, None, 2.0, False, own)

    return _product(look_up, input, weight, None, input.dim() >= 1)


SPARSE = 5
"""The position of `sparse` among the arguments after the weight. A computed weight needs a dense
gradient."""


@rule(F.embedding_bag)
def _embedding_bag(input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    before, after = args[:SPARSE], args[SPARSE + 1 :]
    if len(args) > SPARSE:
        return _compute_first(F.embedding_bag, (input, weight, *before, False, *after), kwargs)
    return _compute_first(F.embedding_bag, (input, weight, *args), {**kwargs, "sparse": False})


# --- attention -----------------------------------------------------------------------------------


@rule(F.multi_head_attention_forward)
def _attention(
    query: Any,
    key: Any,
    value: Any,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Attention by a copy of torch's code, which would itself call this rule again."""
    if isinstance(in_proj_weight, EffectiveWeight) and not query is key is value:
        parts = _chunk(in_proj_weight, 3)
        if parts is NotImplemented:  # a block across the borders of q, k and v can't be split
            parts = torch.chunk(computed(in_proj_weight), 3)
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        kwargs |= {"use_separate_proj_weight": True, **dict(zip(names, parts))}
        in_proj_weight = None
    args = (embed_dim_to_check, num_heads, in_proj_weight, *args)
    if any(getattr(value, "routed", None) for value in (*args, *kwargs.values())):
        if query.dim() != 3:
            raise ArgumentError(
                "route_adapters needs samples, but an attention got a query without a batch "
                f"dimension, of shape {tuple(query.shape)}; pass a batch, or use one adapter at a "
                "time"
            )
        batch = query.shape[1]
        args = tuple(_in_batch(value, batch) for value in args)
        kwargs = {name: _in_batch(value, batch) for name, value in kwargs.items()}
    return _ATTENTION.multi_head_attention_forward(query, key, value, *args, **kwargs)


def _in_batch(value: Any, batch: int) -> Any:
    if not isinstance(value, EffectiveWeight) or value.routed is None:
        return value
    return effective(value.base, value.axes, (), value.routed._replace(batch=batch))


def _attention_linear(input: Any, weight: Any, bias: Any = None) -> Any:
    return (_linear if isinstance(weight, EffectiveWeight) else F.linear)(input, weight, bias)


def _check_padding(key_padding_mask: Tensor, src_len: int, bsz: int) -> None:
    """`F._check_key_padding_mask`, in a way that can be compiled."""
    for axis, expected in enumerate((bsz, src_len)):
        size = key_padding_mask.shape[axis]
        if size != expected:
            raise AssertionError(
                f"Expected key_padded_mask.shape[{axis}] to be {expected}, but got {size}"
            )


def _attention_module() -> ModuleType:
    """Return a Python module with torch's attention, which finds its functions in that module."""
    module = ModuleType("disha.effective.attention")
    own = {
        "linear": _attention_linear,
        "_check_key_padding_mask": _check_padding,
        "has_torch_function": lambda tensors: False,
    }
    vars(module).update({**vars(F), "__name__": module.__name__, **own})
    for name in ("_in_projection_packed", "_in_projection", "multi_head_attention_forward"):
        original = getattr(F, name)
        copied = FunctionType(original.__code__, vars(module), name, original.__defaults__)
        copied.__kwdefaults__ = original.__kwdefaults__
        vars(module)[name] = copied
    sys.modules[module.__name__] = module  # where compiled code looks names up
    return module


_ATTENTION: Any = _attention_module()


# --- writes --------------------------------------------------------------------------------------


def _writes(name: str) -> bool:
    """Whether an operation of this name writes into its first argument: `copy_`, `__iadd__`."""
    if name.startswith("__i"):
        return hasattr(Tensor, f"__{name[3:]}")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _all_writes() -> Iterator[Callable[..., Any]]:
    """Yield every operation of torch that writes into its first argument."""
    for owner in (Tensor, torch, torch._C._nn, F, torch.nn.init):
        for name in dir(owner):
            found = getattr(owner, name, None)
            if _writes(name) and callable(found):
                yield found
    for name in dir(Tensor):
        found = getattr(Tensor, name)
        if isinstance(found, GetSetDescriptorType):  # as in `weight.grad = ...`
            yield found.__set__


_RESHAPES = (
    "as_strided_ resize_ resize_as_ set_ squeeze_ swapaxes_ swapdims_ t_ transpose_ unsqueeze_"
)
"""Writes that change the shape of a tensor."""


@rules(*_all_writes())
def _write(func: Callable[..., Any]) -> Rule:
    """Write into W. The result is the effective weight of W as it is then."""
    reshapes = func.__name__ in _RESHAPES.split()

    def write(*args: Any, **kwargs: Any) -> Any:
        if args:
            written = args[0]
            if reshapes:
                _refuse_to_reshape(written)
            result = _compute_first(func, (_base_of(written), *_sources(*args)), kwargs)
        else:
            name, written = next(iter(kwargs.items()))
            result = _compute_first(func, (), {**kwargs, name: _base_of(written)})
        return result if result is None else written

    return write


def _refuse_to_reshape(weight: Any) -> None:
    """Raise if a weight is an effective one: its blocks would no longer fit."""
    if isinstance(weight, EffectiveWeight):
        raise ArgumentError(
            f"an adapted weight (of shape {tuple(weight.shape)}) can't change its shape in place; "
            "use the operation that returns a new tensor"
        )


def _sources(written: Any, *sources: Any) -> tuple[Any, ...]:
    """Return the values to write: W in place of a tensor whose updates would act twice."""
    if not isinstance(written, EffectiveWeight):
        return sources
    return tuple(
        one.base if isinstance(one, EffectiveWeight) and _same_blocks(one, written) else one
        for one in sources
    )


def _same_blocks(one: EffectiveWeight, other: EffectiveWeight) -> bool:
    """Whether two effective weights have the updates of the same blocks."""
    pairs = zip(one.updates, other.updates)
    same = all(a.block.is_set_to(b.block) for a, b in pairs)
    return same and len(one.updates) == len(other.updates)


@rule(Tensor.data.__set__)  # type: ignore[attr-defined]
def _set_data(weight: Any, value: Any) -> None:
    # `weight.data = weight.data.half()` casts W without adding an update to it.
    _base_of(weight).data = _base_of(value)
