"""The effective weight: a tensor that stands for W + sum of s dW without computing it.

Reading an adapted parameter gives one. Tables list what each operation does with it:

    METADATA   shape, dtype, new_zeros, ones_like ... those of W; nothing is computed
    VIEWS      transposes, rows, items of a stack     an effective weight
    PRODUCTS   linear, matmul, conv, embedding ...    W's own product plus the updates'
    WRITES     copy_, __setitem__, nn.init ...        done to W
    the rest   einsum, norm, arithmetic ...           W + sum of s dW is computed, with its graph

An effective weight is an alias of W with a few more attributes. Code that does not go through
`__torch_function__` sees only W. So a rule must never pass the effective weight on to torch, but
use `base` and `updates` itself. In compiled code, a rule is not dispatched again inside a rule.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import FunctionType, GetSetDescriptorType, ModuleType
from typing import Any, NamedTuple, cast

import torch
import torch._C._dynamo.eval_frame as _frames
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import eager_transforms, vmap
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.nested._internal.nested_tensor import NestedTensor

from disha import functional
from disha.errors import ArgumentError, ModeError
from disha.functional import Layout, Product, Reduced, Update, adapted_linear
from disha.functional.routed import linear_of_runs, with_bone_of_runs
from disha.routing import Route
from disha.sharding import Split, is_sharded, split_of

__all__ = [
    "MOVES",
    "PLAIN",
    "EffectiveWeight",
    "Routed",
    "called_from",
    "computed",
    "effective",
    "effective_part",
    "start_no_graph",
]


PLAIN = (Tensor, torch.nn.Parameter)
"""The classes of weights that an effective weight can be an alias of."""


class Routed(NamedTuple):
    """The updates of a weight when each sample has its own adapter.

    Attributes:
        route: the adapter of each sample.
        updates: adapter -> its updates of this weight.
        batch: 0 if samples are the first dimension. Otherwise the size of the batch, which is the
            second dimension, as in torch's attention.
    """

    route: Route
    updates: Mapping[str, tuple[Update, ...]]
    batch: int = 0

    @property
    def of_all(self) -> tuple[Update, ...] | None:
        """The updates of all samples, if they have the same adapter or none; or else None."""
        if not self.route.is_uniform:
            return None
        return self.updates.get(self.route.names[0] or "", ())

    def check(self, input: Tensor, shape: Sequence[int] | None, has_samples: bool) -> None:
        """Raise unless an input has samples, and their number is a multiple of that of the names.

        Args:
            input: the input, samples first.
            shape: the weight's shape, for errors.
            has_samples: whether the leading dimension of the input is the samples.

        Raises:
            ArgumentError: it does not.
        """
        if not has_samples:
            raise ArgumentError(
                "route_adapters needs samples along the leading dimension of each input, and a "
                f"weight of shape {tuple(shape or ())} got an input of shape {tuple(input.shape)}; "
                "pass a batch, or use one adapter at a time"
            )
        self.route.parts(input.shape[0])

    def added(
        self,
        output: Tensor,
        input: Tensor,
        delta_of: Callable[[Tensor, Update], Tensor],
    ) -> Tensor:
        """Return an output plus, for each sample, the updates of its own adapter.

        Args:
            output: the product with W alone, samples first.
            input: the input, samples first, which `check` allows.
            delta_of: (input, update) -> what the update adds.
        """
        size, device = input.shape[0], input.device
        for adapter, updates in self.updates.items():
            rows = self.route.rows(adapter, size, device)
            for update in updates:
                delta = delta_of(input.index_select(0, rows), update)
                output = output.index_add(0, rows, delta.to(output.dtype))
        return output


class EffectiveWeight(Tensor):
    """W + sum of s dW, not computed: an alias of W that carries the updates.

    Attributes:
        base: W, or a view of it.
        axes: W's layout. The attribute `layout` has another meaning in torch.
        updates: the updates that act on all samples; none while samples are routed.
        routed: the updates of single samples, or None.
    """

    base: Tensor
    axes: Layout
    updates: tuple[Update, ...]
    routed: Routed | None

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation by the tables of this module."""
        rule = RULES.get(func) or RULES.get(getattr(func, "_qualified_op_name", None))
        if rule is not None and kwargs and not args and "input" in kwargs:
            # So torch calls the first argument of all functions in the tables.
            args = (kwargs["input"],)
            kwargs = {name: value for name, value in kwargs.items() if name != "input"}
        if rule is not None and kwargs and "out" in kwargs:
            _refuse_to_lose_gradients(args, kwargs)
        elif rule is not None:
            result = rule(*args, **kwargs) if kwargs else rule(*args)
            if result is not NotImplemented:
                return result
        return _compute_first(func, args, kwargs or {})

    def as_subclass(self, cls: Any) -> Any:
        """Return the computed weight as a tensor of another class.

        Args:
            cls: the class.
        """
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


def start_no_graph(function: Any) -> None:
    """Keep the compiler from starting a graph at a function, or at one that it calls.

    When the compiler leaves a function to Python, it still tries to compile the functions that this
    one calls. This setting stops that. Compiled code that calls the function still includes it.

    Args:
        function: the function.
    """
    if hasattr(_frames, "set_code_exec_strategy"):
        skip = _frames._FrameAction.SKIP
        _frames.set_code_exec_strategy(function.__code__, _frames._FrameExecStrategy(skip, skip))


# An effective weight can't be the input of a graph.
start_no_graph(vars(EffectiveWeight)["__torch_function__"].__func__)


def effective(
    base: Tensor,
    layout: Layout,
    updates: tuple[Update, ...],
    routed: Routed | None = None,
    absent: bool = False,
) -> EffectiveWeight:
    """Return the effective weight of a weight.

    Args:
        base: W; for a DTensor, every rank has all of each block.
        layout: its layout.
        updates: the updates that act on all samples.
        routed: the updates of single samples.
        absent: whether W is on the meta device, and the blocks are elsewhere.

    Examples:
        >>> import torch
        >>> from disha.effective import effective
        >>> from disha.functional import Layout, Update
        >>> W, D = torch.zeros(3, 4), torch.ones(2, 3)
        >>> weight = effective(W, Layout("out in"), (Update(functional.method_of("bone"), D),))
        >>> torch.nn.functional.linear(torch.ones(4), weight)
        tensor([4., 4., 4.])
        >>> weight.sum()
        tensor(12.)
    """
    weight: Any
    if base.is_meta:
        weight = base.as_subclass(WeightOnMeta)
        weight.absent = absent
    elif type(base) not in PLAIN and is_sharded(base):
        weight = Tensor._make_wrapper_subclass(
            ShardedWeight, base.shape, dtype=base.dtype, device=base.device
        )
    else:
        weight = base.as_subclass(EffectiveWeight)
    weight.base = base
    weight.axes = layout
    weight.updates = updates
    weight.routed = routed
    return weight  # type: ignore[no-any-return]


def computed(weight: EffectiveWeight) -> Tensor:
    """Return W + sum of s dW as a plain tensor, with its graph.

    Args:
        weight: an effective weight.

    Raises:
        ModeError: samples are routed, or dropout acts, so no single weight fits all inputs.
    """
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
    if isinstance(weight, ShardedWeight):
        return weight.computed()
    return functional.effective_weight(weight.base, weight.axes, weight.updates)


def effective_part(
    local: Tensor, split: Split, layout: Layout, updates: Sequence[Update], sums: Sequence[bool]
) -> EffectiveWeight:
    """Return the effective weight of this rank's part of a weight.

    Args:
        local: this rank's part of W.
        split: how W is cut.
        layout: the layout of W.
        updates: the updates of all of W.
        sums: along which dimensions of the mesh the gradients of the blocks are summed.

    Raises:
        ModeError: an update can't be cut in the same way, or has dropout.
    """
    own: list[Update] = []
    for update in updates:
        if update.dropout:
            raise ModeError(
                "the adapter's dropout can't act here: each rank would drop different inputs of a "
                "tensor-parallel weight; use dropout=0"
            )
        update = update._replace(block=split.summed(update.block, sums))
        some = functional.update_of_part(update, layout, split.shape, split.part)
        if some is None:
            raise ModeError(
                f"an adapter can't act: its weight is placed as {split.placements}, and its block "
                "can't be cut in the same way; inject after the weight is placed"
            )
        own += some
    return effective(local, layout.of_part(split.part), tuple(own))


class WeightOnMeta(EffectiveWeight):
    """An effective weight whose W is on the meta device, so only dry runs on meta may use it.

    W has no values: its product with an input that has values would be uninitialised memory.
    """

    absent: bool
    """Whether its blocks are elsewhere: W is offloaded, and no hook has loaded it."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run operations on metadata or between tensors on meta; refuse all others."""
        if func not in METADATA and not called_from(MOVES):
            cls.refuse_other_devices((*args, *(kwargs or {}).values()))
        return super().__torch_function__(func, types, args, kwargs)

    @staticmethod
    def refuse_other_devices(given: Sequence[Any]) -> None:
        """Raise unless the arguments of an operation are all on meta, and the blocks too.

        Args:
            given: the arguments.
        """
        tensors = [one for one in given if isinstance(one, Tensor)]
        absent = any(isinstance(one, WeightOnMeta) and one.absent for one in tensors)
        if absent or not all(one.is_meta for one in tensors):
            raise ModeError(
                "an adapted weight is on the meta device, where it has no values, and its input or "
                "its block is not; give the model its weights first. If accelerate has offloaded "
                "it, only the forward of its own module loads it: preload the module that reads "
                "it (preload_module_classes), or keep it on a device"
            )


class ShardedWeight(EffectiveWeight):
    """An effective weight of a DTensor: an empty wrapper, because a DTensor can't have an alias.

    Metadata and writes go to W. A linear layer adds up products of each rank with its part of W and
    of the update. Everything else first computes the part of W + sum of s dW of each rank.
    """

    @property
    def cut(self) -> Split:
        """How W is cut."""
        split = split_of(self.base)
        assert split is not None
        return split

    def computed(self) -> Tensor:
        """Return W + sum of s dW as a DTensor that is placed like W."""
        return self.cut.whole(computed(self.to_local()))

    def to_local(self, *, grad_placements: Sequence[Any] | None = None) -> EffectiveWeight:
        """Return the effective weight of this rank's part.

        Args:
            grad_placements: how the gradient of the part is placed; like W by default.
        """
        split, base = self.cut, cast(Any, self.base)
        placed = split.placements if grad_placements is None else grad_placements
        local = base.to_local(grad_placements=grad_placements)
        sums = [not placement.is_replicate() for placement in placed]
        return effective_part(local, split, self.axes, self.updates, sums)

    def full_tensor(self, **options: Any) -> Tensor:
        """Return all of W + sum of s dW. Collective.

        Args:
            options: those of `DTensor.full_tensor`.
        """
        full: Tensor = cast(Any, self.computed()).full_tensor(**options)
        return full

    def redistribute(self, *args: Any, **options: Any) -> Tensor:
        """Return W + sum of s dW, placed in another way. Collective.

        Args:
            args: those of `DTensor.redistribute`.
            options: those of `DTensor.redistribute`.
        """
        placed: Tensor = cast(Any, self.computed()).redistribute(*args, **options)
        return placed

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product of a DTensor with W, plus those of its parts with the update."""
        split = self.cut
        x, local_x, placements, sums = split.input_of(x)
        local = effective_part(
            cast(Any, self.base).to_local(), split, self.axes, self.updates, sums
        )
        output = F.linear(x, self.base, bias)
        for update in local.updates:
            delta = functional.update_product(F.linear, local_x, local.base, local.axes, update)
            delta = delta.to(output.dtype)
            output = output + split.whole(delta, placements, output.shape)
        return output

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run operations on metadata and writes on W, and products; compute first for others."""
        if func in METADATA or func in WRITES or func is F.linear:
            return super().__torch_function__(func, types, args, kwargs)
        return _compute_first(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compute first: this operation did not go through `__torch_function__`."""
        return _compute_first(func, args, kwargs or {})


MOVES = "accelerate.utils.modeling"
"""The module of accelerate that reads a parameter to move it to another device; it must get W."""


def called_from(module: str) -> bool:
    """Whether the caller outside of disha belongs to a Python module, or to one inside it.

    For the few libraries that read a parameter by its name and need W itself. Always False in a
    graph.

    Args:
        module: the name of a module.
    """
    if torch.compiler.is_compiling():
        return False
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("disha."):
        frame = frame.f_back
    name = "" if frame is None else frame.f_globals.get("__name__", "")
    return f"{name}.".startswith(f"{module}.")


def _compute_first(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Run an operation with the computed weight. If `out=` is the weight, it writes into W."""
    named = {
        name: _base_of(value) if name == "out" else _computed_inside(value)
        for name, value in kwargs.items()
    }
    result = func(*(_computed_inside(value) for value in args), **named)
    return kwargs["out"] if isinstance(kwargs.get("out"), EffectiveWeight) else result


def _refuse_to_lose_gradients(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise if a product of a weight whose block trains goes into `out=`, which has no gradient.

    Code that computes its gradients itself multiplies in this way. An example is the loss of the
    trainers of trl.
    """
    operands = [*args, *(value for name, value in kwargs.items() if name != "out")]
    for one in operands:
        if isinstance(one, EffectiveWeight) and any(up.block.requires_grad for up in one.updates):
            raise ModeError(
                f"a product with an adapted weight of shape {tuple(one.shape)} can't go into out=, "
                "because its block would get no gradient. If a trainer computes its loss from the "
                "weight of the output head, as those of trl do, leave the head out "
                "(exclude='lm_head'); in your own code, use weight.clone()"
            )


def _computed_inside(value: Any) -> Any:
    if isinstance(value, EffectiveWeight):
        return computed(value)
    if type(value) in (list, tuple):
        return type(value)([_computed_inside(one) for one in value])
    if type(value) is dict:
        return {key: _computed_inside(one) for key, one in value.items()}
    return value


def _base_of(value: Any) -> Any:
    if isinstance(value, EffectiveWeight):
        return value.base
    return type(value)(map(_base_of, value)) if type(value) in (list, tuple) else value


# --- writes --------------------------------------------------------------------------------------


def _write(func: Callable[..., Any]) -> Callable[..., Any]:
    """Return the rule of an operation that writes into its first argument: write into W.

    The result is the effective weight of W as it is then.
    """
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


_RESHAPES = (
    "as_strided_ resize_ resize_as_ set_ squeeze_ swapaxes_ swapdims_ t_ transpose_ unsqueeze_"
)
"""Writes that change the shape of a tensor."""


def _refuse_to_reshape(weight: Any) -> None:
    """Raise if a weight is an effective one: its blocks would no longer fit."""
    if isinstance(weight, EffectiveWeight):
        raise ArgumentError(
            f"an adapted weight (of shape {tuple(weight.shape)}) can't change its shape in place; "
            "use the operation that returns a new tensor"
        )


def _sources(written: Any, *sources: Any) -> tuple[Any, ...]:
    """Return the values to write. Where these have the same updates, W is written in their place.

    Otherwise the updates would be written into W, and would then act a second time.
    """
    if not isinstance(written, EffectiveWeight):
        return sources
    return tuple(
        one.base if isinstance(one, EffectiveWeight) and _same_blocks(one, written) else one
        for one in sources
    )


def _same_blocks(one: EffectiveWeight, other: EffectiveWeight) -> bool:
    """Whether two effective weights have the updates of the same blocks."""
    pairs = zip(one.updates, other.updates, strict=False)
    same = all(a.block.is_set_to(b.block) for a, b in pairs)
    return same and len(one.updates) == len(other.updates)


def _set_data(weight: Any, value: Any) -> None:
    # `weight.data = weight.data.half()` casts W without adding an update to it.
    _base_of(weight).data = _base_of(value)


_OPERATORS = (
    "setitem iadd isub imul itruediv idiv ifloordiv imod ipow iand ior ixor ilshift irshift"
)
_OPERATOR_NAMES = frozenset(f"__{name}__" for name in _OPERATORS.split())


def _is_name_of_write(name: str) -> bool:
    """Whether an operation with this name writes into its first argument, as `copy_` does."""
    return (name.endswith("_") and not name.endswith("__")) or name in _OPERATOR_NAMES


def _all_writes() -> Iterator[Callable[..., Any]]:
    """Yield every operation of torch that writes into its first argument."""
    for owner in (Tensor, torch, torch._C._nn, F, torch.nn.init):
        for name in filter(_is_name_of_write, dir(owner)):
            found = getattr(owner, name, None)
            if callable(found):
                yield found
    for name in dir(Tensor):
        found = getattr(Tensor, name)
        if isinstance(found, GetSetDescriptorType):  # as in `weight.grad = ...`
            yield found.__set__


WRITES: dict[Any, Callable[..., Any]] = {func: _write(func) for func in _all_writes()}
WRITES[Tensor.data.__set__] = _set_data  # type: ignore[attr-defined]


# --- metadata ------------------------------------------------------------------------------------


def _ask_base(func: Callable[..., Any]) -> Callable[..., Any]:
    def ask(weight: Any, *args: Any, **kwargs: Any) -> Any:
        return func(_base_of(weight), *map(_base_of, args), **kwargs)

    return ask


_PROPERTIES = (
    "shape dtype device ndim layout requires_grad is_leaf grad grad_fn names itemsize nbytes "
    "is_cpu is_cuda is_xpu is_mps is_meta is_sparse is_sparse_csr is_quantized is_mkldnn is_nested "
    "is_vulkan is_ipu is_maia is_xla is_mtia output_nr retains_grad _version"
)
_QUESTIONS = (
    "dim size stride numel nelement ndimension element_size is_floating_point is_complex is_signed "
    "is_contiguous is_inference is_conj is_neg is_pinned is_shared get_device storage_offset "
    "dim_order __len__ __hash__ is_coalesced has_names _is_view is_same_size result_type "
    "register_hook register_post_accumulate_grad_hook retain_grad"
)
_CREATIONS = (
    "new_empty new_empty_strided new_full new_ones new_tensor new_zeros "
    "empty_like full_like ones_like rand_like randint_like randn_like zeros_like"
)


def _create(func: Callable[..., Any]) -> Callable[..., Any]:
    """Return the rule of an operation that makes a tensor like its first argument."""

    def create(like: Any, *args: Any, **kwargs: Any) -> Any:
        return _compute_first(func, (_base_of(like), *args), kwargs)  # others are values

    return create


def _existing(names: str, *owners: Any) -> Iterator[Any]:
    """Yield the attributes with these names that this version of torch has."""
    for name in names.split():
        for owner in owners:
            if hasattr(owner, name):
                yield getattr(owner, name)


def _data_ptr(weight: Any) -> int:
    if called_from(MOVES):
        return weight.base.data_ptr()  # type: ignore[no-any-return]
    # Kept as long as the weight lives, because the caller uses the address after the call.
    weight.addressed = computed(weight)
    return weight.addressed.data_ptr()  # type: ignore[no-any-return]


def _gradients(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """`torch.autograd.grad`: the gradient of a weight is that of W."""
    return _compute_first(torch.autograd.grad, (outputs, _base_of(inputs), *args), kwargs)


METADATA: dict[Any, Callable[..., Any]] = {
    **{one.__get__: _ask_base(one.__get__) for one in _existing(_PROPERTIES, Tensor)},
    **{func: _ask_base(func) for func in _existing(_QUESTIONS, Tensor, torch)},
    **{func: _create(func) for func in _existing(_CREATIONS, Tensor, torch)},
    Tensor.data_ptr: _data_ptr,
    torch.autograd.grad: _gradients,
}


# --- views ---------------------------------------------------------------------------------------


def _viewed(weight: EffectiveWeight, base: Tensor, layout: Layout) -> EffectiveWeight:
    return effective(base, layout, weight.updates, weight.routed)


def _mapped(
    weight: EffectiveWeight,
    base: Tensor,
    layout: Layout,
    change: Callable[[Update], Sequence[Update] | None],
) -> Any:
    """Return a view with each update changed; NotImplemented if `change` returns None."""
    updates = _changed(weight.updates, change)
    routed = weight.routed
    if updates is None:
        return NotImplemented
    if routed is not None:
        own: dict[str, tuple[Update, ...]] = {}
        for adapter, some in routed.updates.items():
            of_samples = _changed(some, change)
            if of_samples is None:
                return NotImplemented
            own[adapter] = of_samples
        routed = routed._replace(updates=own)
    return effective(base, layout, updates, routed) if updates or routed is not None else base


def _changed(
    updates: Sequence[Update], change: Callable[[Update], Sequence[Update] | None]
) -> tuple[Update, ...] | None:
    changed: list[Update] = []
    for update in updates:
        some = change(update)
        if some is None:
            return None
        changed += some
    return tuple(changed)


def _transpose(weight: Any, dim0: int = 0, dim1: int = 1) -> Any:
    layout = weight.axes.turned()
    ndim = weight.base.dim()
    if layout is None or {dim0 % ndim, dim1 % ndim} != {ndim - 2, ndim - 1}:
        return NotImplemented
    return _viewed(weight, torch.transpose(weight.base, -2, -1), layout)


def _swapaxes(weight: Any, axis0: int, axis1: int) -> Any:
    return _transpose(weight, axis0, axis1)


def _t(weight: Any) -> Any:
    return _transpose(weight) if weight.base.dim() == 2 else NotImplemented


def _mt(weight: Any) -> Any:
    return _transpose(weight, -2, -1) if weight.base.dim() >= 2 else NotImplemented


_INDEX_DTYPES = (torch.int64, torch.int32)
"""The dtypes of a tensor of indices. To torch, uint8 and bool are masks."""


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
        return _mapped(weight, base[index], item, lambda u: [u.at(index)])
    if layout.expert_dim == 0 and isinstance(index, slice):
        return _mapped(weight, base[index], layout, lambda u: [u.at(index)])
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

    def of_rows(update: Update) -> Sequence[Update] | None:
        return functional.update_of_rows(update, start, stop, size)

    return _mapped(weight, weight.base[start:stop], weight.axes, of_rows)


def _split(weight: Any, split_size: Any, dim: int = 0) -> Any:
    sizes = [part.shape[dim] for part in weight.base.split(split_size, dim)]
    return _in_parts(weight, sizes, dim)


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


def _unbind(weight: Any, dim: int = 0) -> Any:
    layout = weight.axes
    if dim or layout.expert_dim != 0:
        return NotImplemented
    if weight.routed is not None or not weight.updates:
        return tuple(_item(weight, index) for index in range(weight.base.shape[0]))
    each = zip(*(update.each() for update in weight.updates), strict=True)
    item, bases = layout.of_one_expert(), weight.base.unbind(0)
    return tuple(effective(base, item, own) for base, own in zip(bases, each, strict=True))


def _index_select(weight: Any, dim: int, index: Tensor) -> Any:
    return _item(weight, index) if dim == 0 == weight.axes.expert_dim else NotImplemented


def _select(weight: Any, dim: int, index: int) -> Any:
    return _item(weight, index) if dim == 0 == weight.axes.expert_dim else NotImplemented


def _cast(func: Callable[..., Any]) -> Callable[..., Any]:
    def cast(weight: Any, *args: Any, **kwargs: Any) -> Any:
        named = {name: _base_of(value) for name, value in kwargs.items()}
        base = func(_base_of(weight), *map(_base_of, args), **named)
        if not isinstance(weight, EffectiveWeight):
            return base  # another tensor, cast like this weight
        if not isinstance(base, Tensor):
            return base  # `type()` without arguments
        if not base.is_floating_point() or base.device != weight.base.device:
            return NotImplemented  # the blocks stay on their device
        return _viewed(weight, base, weight.axes)

    return cast


_cast_to = _cast(Tensor.to)


def _to(weight: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(weight, EffectiveWeight) and called_from(MOVES):
        return weight.base.to(*args, **kwargs)
    return _cast_to(weight, *args, **kwargs)


def _detach(weight: Any) -> Any:
    def detached(update: Update) -> Sequence[Update]:
        return [update._replace(block=update.block.detach())]

    return _mapped(weight, weight.base.detach(), weight.axes, detached)


def _data(weight: Any) -> Any:
    def data(update: Update) -> Sequence[Update]:
        return [update._replace(block=update.block.data)]

    return _mapped(weight, weight.base.data, weight.axes, data)


VIEWS: dict[Any, Callable[..., Any]] = {
    Tensor.T.__get__: _t,  # type: ignore[attr-defined]
    Tensor.mT.__get__: _mt,  # type: ignore[attr-defined]
    Tensor.data.__get__: _data,  # type: ignore[attr-defined]
    Tensor.detach: _detach,
    Tensor.__getitem__: _item,
}
for _owner in (Tensor, torch):
    VIEWS |= {
        _owner.t: _t,
        _owner.transpose: _transpose,
        _owner.swapaxes: _swapaxes,
        _owner.swapdims: _transpose,
        _owner.split: _split,
        _owner.chunk: _chunk,
        _owner.unbind: _unbind,
        _owner.index_select: _index_select,
        _owner.select: _select,
    }
_CASTS = "type type_as float double half bfloat16 contiguous"
VIEWS |= {func: _cast(func) for func in _existing(_CASTS, Tensor)}
VIEWS[Tensor.to] = _to


# --- products ------------------------------------------------------------------------------------


def _is_dense(input: Tensor) -> bool:
    """Whether an input is a dense tensor, neither nested nor sparse.

    For others, the weight is computed, so torch's product does what it does with a plain weight.
    """
    return input.layout is torch.strided and not input.is_nested


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(input, EffectiveWeight) or isinstance(bias, EffectiveWeight):
        return NotImplemented
    if weight.axes.pattern != "out in" or not _is_dense(input):
        return NotImplemented
    if isinstance(weight, ShardedWeight):
        reduces = all(update.method.reduces for update in weight.updates)
        if weight.routed is not None or not reduces or not is_sharded(input):
            return NotImplemented
        return weight.linear(input, bias)
    if weight.routed is None:
        return adapted_linear(input, weight.base, bias, weight.updates)
    return _routed_linear(input, weight, bias)


def _matmul(input: Any, other: Any) -> Any:
    """Multiply x @ W for a weight whose inputs come first, or W @ x if they come last."""
    if isinstance(input, EffectiveWeight):
        return NotImplemented if isinstance(other, EffectiveWeight) else _weight_first(input, other)
    if not _is_dense(input):
        return NotImplemented
    turned = _transpose(other, -2, -1)
    if other.axes.pattern == "in out":
        return _linear(input, turned)
    if other.axes.pattern == "expert in out" and input.dim() == 3 and other.routed is None:
        return functional.adapted_stack(input, turned.base, turned.updates)
    return NotImplemented


def _mm(input: Any, mat2: Any) -> Any:
    return _matmul(input, mat2)


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


def _rmatmul(weight: Any, other: Any) -> Any:
    return _matmul(other, weight)


def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if not isinstance(mat2, EffectiveWeight) or mat2.axes.pattern != "in out":
        return NotImplemented
    if isinstance(mat1, EffectiveWeight) or input.dim() != 1 or (beta, alpha) != (1, 1):
        return NotImplemented
    return _linear(mat1, _transpose(mat2), input)


def _baddbmm(input: Any, batch1: Any, batch2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if isinstance(input, EffectiveWeight) or (beta, alpha) != (1, 1):
        return NotImplemented
    product = _biased_stack(input, batch1, batch2)
    if product is not NotImplemented:
        return product
    product = _matmul(batch1, batch2)
    return product if product is NotImplemented else input.to(product.dtype) + product


def _biased_stack(bias: Tensor, x: Any, weight: Any) -> Any:
    """Return `baddbmm` plus the updates through shard sums. So zero blocks change no bit."""
    if isinstance(x, EffectiveWeight) or not _is_dense(x):
        return NotImplemented
    if weight.axes.pattern != "expert in out" or weight.routed is not None:
        return NotImplemented
    if not all(update.method.reduces for update in weight.updates):
        return NotImplemented

    def multiply(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        w = torch.transpose(w, -2, -1)
        return torch.bmm(x, w) if bias is None else torch.baddbmm(bias, x, w)

    turned = _transpose(weight, -2, -1)
    return functional.adapted_product(multiply, x, turned.base, bias, turned.axes, turned.updates)


def _grouped(multiply: Callable[..., Tensor]) -> Callable[..., Any]:
    def grouped(input: Any, weight: Any, offs: Any = None, *more: Any, **named: Any) -> Any:
        if not isinstance(weight, EffectiveWeight) or isinstance(input, EffectiveWeight):
            return NotImplemented
        if weight.axes.pattern != "expert in out" or weight.routed is not None:
            return NotImplemented
        if more or any(value is not None for value in named.values()) or offs is None:
            return NotImplemented
        turned = _transpose(weight, -2, -1)
        return functional.adapted_grouped(multiply, input, turned.base, offs, turned.updates)

    return grouped


def _product(
    multiply: Product,
    input: Any,
    weight: EffectiveWeight,
    bias: Any,
    has_samples: bool,
    groups: int = 1,
) -> Tensor:
    """Return a product with an effective weight; if routed, each sample uses its own adapter."""
    base, layout, routed = weight.base, weight.axes, weight.routed
    if routed is None:
        return functional.adapted_product(
            multiply, input, base, bias, layout, weight.updates, groups
        )

    routed.check(input, base.shape, has_samples)
    if routed.of_all is not None:
        return functional.adapted_product(
            multiply, input, base, bias, layout, routed.of_all, groups
        )

    def delta_of(x: Tensor, update: Update) -> Tensor:
        return functional.update_product(multiply, x, base, layout, update, groups)

    return routed.added(multiply(input, base, bias), input, delta_of)


def _grouped_of_transformers(*args: Any, **kwargs: Any) -> Tensor:
    product: Tensor = torch.ops.transformers.grouped_mm_fallback(*args, **kwargs)
    return product


def _conv(func: Callable[..., Tensor]) -> Callable[..., Any]:
    """Return the rule of a convolution."""

    def conv(input: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(weight, EffectiveWeight) or not weight.axes.has_kernel:
            return NotImplemented

        def convolve(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            return func(x, w, b, *args, **kwargs)

        # After the bias: stride, padding, then dilation or output_padding, then groups.
        groups = args[3] if len(args) > 3 else kwargs.get("groups", 1)
        return _product(convolve, input, weight, bias, input.dim() == weight.base.dim(), groups)

    return conv


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
    if not _is_dense(input) or scale_grad_by_freq:  # which also scales the gradient of the block
        return NotImplemented

    def look_up(indices: Tensor, table: Tensor, bias: Tensor | None) -> Tensor:
        own = sparse and table is weight.base  # a computed weight needs a dense gradient
        return F.embedding(indices, table, padding_idx, None, 2.0, False, own)

    output = _product(look_up, input, weight, None, input.dim() >= 1)
    return output if max_norm is None else _renormed(output, max_norm, norm_type)


def _embedding_bag(input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    before, after = args[:SPARSE], args[SPARSE + 1 :]
    if len(args) > SPARSE:
        return _compute_first(F.embedding_bag, (input, weight, *before, False, *after), kwargs)
    return _compute_first(F.embedding_bag, (input, weight, *args), {**kwargs, "sparse": False})


SPARSE = 5
"""The position of `sparse` among the arguments after the weight. A computed weight needs a dense
gradient."""


def _renormed(output: Tensor, max_norm: float, norm_type: float) -> Tensor:
    """Limit the norm of looked-up rows. Torch changes the weight in place; here W is unchanged."""
    norms = torch.linalg.vector_norm(output, norm_type, dim=-1, keepdim=True)
    shrunk = output * (max_norm / (norms + RENORM_EPSILON))
    return torch.where(norms > max_norm, shrunk, output)


RENORM_EPSILON = 1e-7
"""Added to a norm before max_norm is divided by it, as in torch."""


# --- routed samples ------------------------------------------------------------------------------


FEW_ROWS = 8
"""Samples of fewer rows are sorted by adapter, so that each adapter adds one product.

Sorting costs passes over the output. Without sorting, each sample costs one product.
"""


def _routed_linear(input: Tensor, weight: EffectiveWeight, bias: Tensor | None) -> Tensor:
    routed, base = weight.routed, weight.base
    assert routed is not None
    if not routed.batch:
        return _routed_rows(input, base, bias, weight.axes, routed)
    # Samples are the second dimension, or the first two dimensions are flattened.
    first = input.reshape(-1, routed.batch, input.shape[-1]).transpose(0, 1)
    output = _routed_rows(first, base, bias, weight.axes, routed)
    return output.transpose(0, 1).contiguous().view(*input.shape[:-1], output.shape[-1])


def _routed_rows(
    input: Tensor, base: Tensor, bias: Tensor | None, layout: Layout, routed: Routed
) -> Tensor:
    """Return a linear product in which each sample has its own updates. Samples come first."""
    routed.check(input, base.shape, has_samples=input.dim() >= 2)
    if routed.of_all is not None or not input.shape[0]:
        return adapted_linear(input, base, bias, routed.of_all or ())
    every = [update for updates in routed.updates.values() for update in updates]
    if not all(update.method.reduces for update in every):
        return _linear_by_adapter(input, base, bias, routed)
    output = F.linear(input, base, bias)
    alike = _alike(routed, layout, base.shape[0])
    if alike is None:
        return routed.added(
            output,
            input,
            lambda x, update: functional.update_product(F.linear, x, base, layout, update),
        )
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        choices = routed.route.choices(list(alike), input.device)
        delta = functional.routed_bone_delta(input, [one.matrix for one in alike.values()], choices)
        return output + delta.to(output.dtype)
    return _with_alike(output, input, routed.route, alike)


def _linear_by_adapter(input: Tensor, base: Tensor, bias: Tensor | None, routed: Routed) -> Tensor:
    """Return a linear product whose samples are sorted by adapter, and put back afterwards."""
    route, size, device = routed.route, input.shape[0], input.device
    runs = route.sorted_runs(size)
    order = None if runs == route.runs(size) else route.order(size, device)
    each = [(routed.updates.get(run.adapter or "", ()), run.stop - run.start) for run in runs]
    return linear_of_runs(input, base, bias, each, order)


def _with_alike(
    output: Tensor, input: Tensor, route: Route, alike: Mapping[str, Reduced]
) -> Tensor:
    """Return an output plus the shard-sum updates of each sample."""
    size = input.shape[0]
    rows, outputs = (one.reshape(size, -1, one.shape[-1]) for one in (input, output))
    runs, order = route.runs(size), None
    few = rows.shape[1] * route.parts(size) < FEW_ROWS and len(runs) > len(alike)
    if few or torch.is_grad_enabled() or not outputs.is_contiguous():
        runs, order = route.sorted_runs(size), route.order(size, input.device)
    each = [
        (one.matrix if (one := alike.get(run.adapter or "")) else None, run.stop - run.start)
        for run in runs
    ]
    return with_bone_of_runs(outputs, rows, each, order).reshape(output.shape)


def _alike(routed: Routed, layout: Layout, out_features: int) -> dict[str, Reduced] | None:
    """Return the shard-sum update of each adapter if all have one size and no tiles, else None."""
    found: dict[str, Reduced] = {}
    for adapter, updates in routed.updates.items():
        small = functional.reduced_updates(updates, layout, out_features)
        if len(small) > 1 or any(one.dropout for one in small):
            return None
        if small:
            found[adapter] = small[0]
    sizes = {(one.matrix.shape, one.matrix.dtype) for one in found.values()}
    if len(sizes) != 1 or next(iter(sizes))[0][-1] != out_features:
        return None
    return found


# --- attention -----------------------------------------------------------------------------------


def _attention(query: Any, *args: Any, **kwargs: Any) -> Any:
    """`F.multi_head_attention_forward`, whose projections are products of effective weights.

    Torch's code first checks whether an argument overrides torch functions, and would call this
    rule again. So a copy of it runs, with the products of this module and without that check.
    """
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
    return _ATTENTION.multi_head_attention_forward(query, *args, **kwargs)


def _in_batch(value: Any, batch: int) -> Any:
    if not isinstance(value, EffectiveWeight) or value.routed is None:
        return value
    return effective(value.base, value.axes, (), value.routed._replace(batch=batch))


def _attention_linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(weight, EffectiveWeight):
        return _linear(input, weight, bias)
    return F.linear(input, weight, bias)


def _packed_projection(q: Any, k: Any, v: Any, w: Any, b: Any = None) -> Any:
    """`F._in_projection_packed`: one product for each input of q, k and v, as in torch."""
    if k is not v:
        return _separate_projections(q, k, v, *_packed_rows(w, 1, 1, 1), *_packed_rows(b, 1, 1, 1))
    if q is k:
        return _unpacked(_attention_linear(q, w, b), 3)
    (w_q, w_kv), (b_q, b_kv) = _packed_rows(w, 1, 2), _packed_rows(b, 1, 2)
    return (_attention_linear(q, w_q, b_q), *_unpacked(_attention_linear(k, w_kv, b_kv), 2))


def _packed_rows(packed: Any, *thirds: int) -> Sequence[Any]:
    """Split the packed weight or bias of q, k and v into parts.

    Args:
        packed: the weight or the bias, or None.
        thirds: how many of q, k and v each part holds.
    """
    if packed is None:
        return [None] * len(thirds)
    sizes = [packed.shape[0] // 3 * count for count in thirds]
    if not isinstance(packed, EffectiveWeight):
        return torch.split(packed, sizes)
    parts = _in_parts(packed, sizes, 0)
    # A block across the borders of q, k and v can't be split, so the weight is computed.
    if parts is NotImplemented:
        return torch.split(computed(packed), sizes)
    return parts  # type: ignore[no-any-return]


def _unpacked(projected: Tensor, count: int) -> tuple[Tensor, ...]:
    apart = torch.unflatten(projected, -1, (count, projected.shape[-1] // count))
    parts = apart.unsqueeze(0).transpose(0, -2).squeeze(-2)
    return tuple(parts.contiguous())


def _separate_projections(
    q: Any, k: Any, v: Any, w_q: Any, w_k: Any, w_v: Any,
    b_q: Any = None, b_k: Any = None, b_v: Any = None,
) -> Any:  # fmt: skip
    """`F._in_projection`: q, k and v have separate weights."""
    return tuple(
        _attention_linear(input, weight, bias)
        for input, weight, bias in ((q, w_q, b_q), (k, w_k, b_k), (v, w_v, b_v))
    )


def _check_padding(key_padding_mask: Tensor, src_len: int, bsz: int) -> None:
    """`F._check_key_padding_mask`, in a way that can be compiled."""
    for axis, (size, expected) in enumerate(
        zip(key_padding_mask.shape, (bsz, src_len), strict=True)
    ):
        if size != expected:
            raise AssertionError(
                f"Expected key_padded_mask.shape[{axis}] to be {expected}, but got {size}"
            )


def _attention_module() -> ModuleType:
    """Return a Python module with torch's attention, which finds its functions in that module."""
    module = ModuleType("disha.effective.attention")
    parts = {
        "linear": _attention_linear,
        "_in_projection_packed": _packed_projection,
        "_in_projection": _separate_projections,
        "_check_key_padding_mask": _check_padding,
        "has_torch_function": lambda tensors: False,
    }
    vars(module).update({**vars(F), "__name__": module.__name__, **parts})
    original = F.multi_head_attention_forward
    attention = FunctionType(
        original.__code__, vars(module), original.__name__, original.__defaults__
    )
    attention.__kwdefaults__ = original.__kwdefaults__
    vars(module)["multi_head_attention_forward"] = attention
    sys.modules[module.__name__] = module  # where compiled code looks names up
    return module


_ATTENTION: Any = _attention_module()


# --- the tables ----------------------------------------------------------------------------------

PRODUCTS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    Tensor.__matmul__: _matmul,
    Tensor.__rmatmul__: _rmatmul,
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
    F.multi_head_attention_forward: _attention,
    # From transformers, by name, because it exists only after that is imported.
    "transformers::grouped_mm_fallback": _grouped(_grouped_of_transformers),
    F.conv1d: _conv(F.conv1d),
    F.conv2d: _conv(F.conv2d),
    F.conv3d: _conv(F.conv3d),
    F.conv_transpose1d: _conv(F.conv_transpose1d),
    F.conv_transpose2d: _conv(F.conv_transpose2d),
    F.conv_transpose3d: _conv(F.conv_transpose3d),
}
PRODUCTS[torch._grouped_mm] = _grouped(torch._grouped_mm)
for _owner in (Tensor, torch):
    PRODUCTS |= {
        _owner.matmul: _matmul,
        _owner.mm: _mm,
        _owner.bmm: _mm,
        _owner.mv: _mv,
        _owner.addmm: _addmm,
        _owner.baddbmm: _baddbmm,
    }

RULES: dict[Any, Callable[..., Any]] = {**WRITES, **METADATA, **VIEWS, **PRODUCTS}


def _dispatch_private_functions() -> None:
    """Let compiled code pass torch's private functions to the rules, as Python does.

    The compiler looks a function up in torch's list of those that a subclass may override. Private
    ones, such as the grouped product, are not listed, so compiled code would use W alone.
    """
    listed = torch.overrides.get_overridable_functions()[torch]
    names = (name for name in dir(torch._C._VariableFunctions) if not name.startswith("__"))
    functions = {getattr(torch, name) for name in names if name[0] == "_" and hasattr(torch, name)}
    listed.extend(functions.difference(listed))
    compiler = sys.modules.get("torch._dynamo.variables.torch")
    if compiler is not None:  # it keeps a copy of the list
        compiler.get_overridable_functions().update(functions)


_dispatch_private_functions()


def _come_before_nested_tensors() -> None:
    """Let a nested tensor leave an operation to an effective weight.

    Torch asks the arguments from left to right. A nested tensor would run the operation itself,
    with W alone, because it does not look at the types of other arguments.
    """
    ask: Any = vars(NestedTensor)["__torch_function__"].__func__

    def defer(
        cls: Any, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(one, EffectiveWeight) for one in types):
            return NotImplemented
        return ask(cls, func, types, args, kwargs)

    NestedTensor.__torch_function__ = classmethod(defer)  # type: ignore[assignment]


_come_before_nested_tensors()


def _compute_where_nothing_asks() -> None:
    """Give computed weights to custom autograd functions, and to the transforms of `torch.func`.

    Otherwise, a function would give the block no gradient, and a transform would see W alone.
    """
    owner: Any = torch.autograd.Function
    apply_plain = vars(owner)["apply"].__func__

    # The compiler recognises it by its name.
    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        if any(isinstance(one, EffectiveWeight) for one in given):
            if any(isinstance(one, WeightOnMeta) for one in given):
                WeightOnMeta.refuse_other_devices(given)
            return _compute_first(partial(apply_plain, cls), args, kwargs)
        return apply_plain(cls, *args, **kwargs)

    owner.apply = classmethod(apply)
    for module, name in ((vmap, "_add_batch_dim"), (eager_transforms, "_wrap_for_grad")):
        setattr(module, name, _wrapping_computed(getattr(module, name)))


def _wrapping_computed(wrap: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of a transform that wraps an argument, for computed weights."""

    def wrapped(tensor: Any, *args: Any) -> Any:
        if isinstance(tensor, EffectiveWeight):
            if torch.compiler.is_compiling():
                tensor = computed(tensor)
            else:  # outside of the transform, which has begun
                with temporarily_pop_interpreter_stack():
                    tensor = computed(tensor)
        return wrap(tensor, *args)

    return wrapped


_compute_where_nothing_asks()
