"""The effective weight: a tensor that stands for W + sum of s dW without computing it.

Reading an adapted parameter gives one. What each operation does with it:

    facts      shape, dtype, new_zeros, ones_like ... those of W; nothing is computed
    views      transposes, outputs, items of a stack  an effective weight
    products   linear, matmul, conv, embedding ...    W's own product plus the updates'
    attention  F.multi_head_attention_forward         its projections are such products
    writes     copy_, __setitem__, nn.init ...        done to W; the result is effective again
    the rest   einsum, norm, arithmetic ...           W + sum of s dW is computed, with its graph

Each has a module, in which each rule stands under the operations that it is for.

An effective weight is an alias of W with a few more attributes. Eager code that does not call
`__torch_function__` is caught by `__torch_dispatch__`, through which every operation passes.

Inside a rule: never pass an effective weight on to torch; take `weight.base` and `weight.updates`.
In compiled code, dynamo does not call `__torch_function__` again inside a rule, so torch would
compute with W, without an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from disha.effective.rules import RULES, Operation
from disha.errors import ArgumentError, ModeError
from disha.functional import Layout
from disha.functional.weight_updates import Updates
from disha.private_torch import (
    OP_NAME,
    FakeTensor,
    as_it_is,
    start_no_graph,
    tree_leaves,
    written_arguments,
)
from disha.sharding.tensors import is_sharded


class EffectiveWeight(Tensor):
    """W + sum of s dW, not computed: an alias of W that carries the updates."""

    base: Tensor
    weight_layout: Layout  # in torch, the attribute `layout` has another meaning
    updates: Updates

    @classmethod
    def __torch_function__(
        cls,
        func: Operation,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation by its rule."""
        rule = RULES.get(func) or RULES.get(getattr(func, OP_NAME, None))
        named = dict(kwargs or {})
        if named.get("out") is None:
            named.pop("out", None)  # None is torch's default
        if rule is not None:
            if not args and "input" in named:
                # Rules take their first argument by position. Where torch names it `input`, a
                # caller may have passed it by that name. Other rules take theirs by torch's name.
                args = (named.pop("input"),)
            if "out" in named:
                _refuse_to_lose_gradients(args, named)
            else:
                result = rule(*args, **named)
                if result is not NotImplemented:
                    return result
        return compute_first(func, args, named)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute the weight for an operation that did not call `__torch_function__`.

        Autograd has already recorded that operation, with W, so the blocks would get no gradient.
        If one of them trains, this raises.
        """
        named = kwargs or {}
        if func.__name__.partition(".")[0] in RESHAPES:
            refuse_to_reshape(args[0])
        if torch.is_grad_enabled():
            _refuse_to_train_unseen(func, tree_leaves((args, named)))
        return compute_first(func, args, named)

    def as_subclass(self, cls: Any) -> Any:
        """Return the computed weight as a tensor of another class."""
        return compute(self).as_subclass(cls)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = compute(self).detach().clone()
        memo[id(self)] = copied
        return copied

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of W that a tensor does not have, such as `infshape` of muP."""
        if "base" not in self.__dict__:  # while torch makes the alias
            raise AttributeError(name)
        return getattr(self.base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of W, such as `_no_weight_decay`."""
        if hasattr(type(self), name):  # `data`, `grad`, `requires_grad` ...: their rules write to W
            super().__setattr__(name, value)
        else:
            setattr(self.base, name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return compute(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

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


class TracedWeight(EffectiveWeight):
    """An effective weight in compiled code. Dynamo traces no class that overrides these methods."""

    __torch_dispatch__ = Tensor.__torch_dispatch__  # type: ignore[assignment]
    __setattr__ = Tensor.__setattr__  # type: ignore[assignment]


class AbsentWeight(EffectiveWeight):
    """An effective weight without values, on the meta device or partitioned: only facts."""

    @property
    def updates(self) -> Updates:  # type: ignore[override]
        """Raise: a product with W would be uninitialised memory."""
        raise ModeError(
            "an adapted weight has no values here. If it is on the meta device, give the model its "
            "weights first; if accelerate has offloaded it, preload the module that reads it "
            "(preload_module_classes), or keep it on a device; if DeepSpeed ZeRO-3 partitions it, "
            "call the model, or read it inside deepspeed.zero.GatheredParameters"
        )


class ShardedWeight(EffectiveWeight):
    """The effective weight of a DTensor: what asks for a DTensor takes it for one.

    It is an alias of this rank's part, because an alias of a DTensor would be a DTensor.
    """

    updates: Any  # SplitUpdates

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The class that `isinstance` sees."""
        return type(self.base)

    def to_local(self, **placements: Any) -> Tensor:
        """Return the effective weight of this rank's part."""
        return self.updates.effective_part(self.base, self.weight_layout)

    def full_tensor(self, **options: Any) -> Tensor:
        """Return the computed weight with all of its values."""
        return compute(self).full_tensor(**options)  # type: ignore[attr-defined]

    def redistribute(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the computed weight in other placements."""
        return compute(self).redistribute(*args, **kwargs)  # type: ignore[attr-defined]


# An effective weight can't be the input of a graph, so dynamo must not start one in this function.
start_no_graph(vars(EffectiveWeight)["__torch_function__"].__func__)


def make_effective(base: Tensor, layout: Layout, updates: Updates) -> EffectiveWeight:
    """Return the effective weight of W: an alias, which shares W's memory and graph."""
    compiling = is_compiling()
    cls = TracedWeight if compiling else EffectiveWeight
    weight: Any
    if type(base) is FakeTensor:
        with as_it_is():  # else the alias would be a FakeTensor
            weight = base.as_subclass(cls)
    elif is_sharded(base):
        weight = base.to_local().as_subclass(cls if compiling else ShardedWeight)
    else:
        weight = base.as_subclass(cls)
    if compiling:
        weight.base = base
        weight.weight_layout = layout
        weight.updates = updates
        return weight
    attributes = weight.__dict__  # `weight.base = base` would set an attribute of W
    attributes["base"] = base
    attributes["weight_layout"] = layout
    attributes["updates"] = updates
    return weight


def make_absent(base: Tensor, layout: Layout) -> AbsentWeight:
    """Return the effective weight of a W that has no values."""
    weight = base.as_subclass(AbsentWeight)
    weight.__dict__.update(base=base, weight_layout=layout)
    return weight


def compute(weight: EffectiveWeight) -> Tensor:
    """Return W + sum of s dW as a plain tensor, with its graph."""
    return weight.updates.compute_weight(weight.base, weight.weight_layout)


def compute_first(func: Operation, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation with computed weights. A weight that it writes into is given as W."""
    written = written_arguments(func)
    if kwargs.get("inplace"):  # as in F.relu
        written = {0, "input"}

    def prepare(place: int | str, value: Any) -> Any:
        return base_inside(value) if place in written else compute_inside(value)

    positional = [prepare(position, value) for position, value in enumerate(args)]
    named = {name: prepare(name, value) for name, value in kwargs.items()}
    result = func(*positional, **named)
    for value in (*args, *kwargs.values()):
        if isinstance(value, EffectiveWeight) and result is value.base:
            return value  # W was written and returned, so its adapters act on the result
    return result


def compute_inside(value: Any) -> Any:
    """Return a value with the effective weights in it computed."""
    return _replace_weights(value, compute)


def base_inside(value: Any) -> Any:
    """Return a value with W in place of the effective weights in it."""
    return _replace_weights(value, _base_of)


def _base_of(weight: EffectiveWeight) -> Tensor:
    return weight.base


def _replace_weights(value: Any, replacement: Callable[[EffectiveWeight], Tensor]) -> Any:
    """Return a value with the effective weights in it replaced, also in lists, tuples and dicts."""
    if isinstance(value, EffectiveWeight):
        return replacement(value)
    if type(value) in (list, tuple):
        return type(value)([_replace_weights(item, replacement) for item in value])
    if type(value) is dict:
        return {key: _replace_weights(item, replacement) for key, item in value.items()}
    return value


RESHAPES = {
    "as_strided_",
    "resize_",
    "resize_as_",
    "set_",
    "squeeze_",
    "swapaxes_",
    "swapdims_",
    "t_",
    "transpose_",
    "unsqueeze_",
}
"""Names of writes that change the shape of a tensor."""


def refuse_to_reshape(weight: Any) -> None:
    """Raise if a weight is an effective one: in another shape, its blocks would not fit it."""
    if isinstance(weight, EffectiveWeight):
        raise ArgumentError(
            f"an adapted weight (of shape {tuple(weight.shape)}) can't change its shape in place; "
            "resize it before you inject, or use the operation that returns a new tensor"
        )


def _blocks_train(weight: EffectiveWeight) -> bool:
    return any(block.requires_grad for block in weight.updates.blocks)


def _refuse_to_train_unseen(func: Operation, values: Sequence[Any]) -> None:
    """Raise if a weight trains: autograd has recorded the operation with W, and not with blocks."""
    weights = [value for value in values if isinstance(value, EffectiveWeight)]
    for weight in weights:
        if weight.base.requires_grad or _blocks_train(weight):
            raise ModeError(
                f"{func} got an adapted weight of shape {tuple(weight.shape)} from code that does "
                "not call __torch_function__, so its block would get no gradient; pass "
                "weight.clone() to that code, the computed weight"
            )


def _refuse_to_lose_gradients(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise if a product of a weight that trains goes into `out=`, which has no gradient."""
    operands = [value for name, value in kwargs.items() if name != "out"]
    for operand in (*args, *operands):
        if isinstance(operand, EffectiveWeight) and _blocks_train(operand):
            raise ModeError(
                f"a product with an adapted weight of shape {tuple(operand.shape)} can't go into "
                "out=, because its block would get no gradient. If a trainer computes its loss "
                "from the weight of the output head, as those of trl do, leave the head out "
                "(exclude='lm_head'); in your own code, use weight.clone()"
            )
