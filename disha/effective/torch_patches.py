"""What disha changes in torch: functions that take tensors without asking their class.

The first injection calls `install`; importing changes nothing. Without these changes, an adapter
would not act, or another one would, and no error would say so:

- The `apply` of a custom function of autograd, and `custom_function_call`, which runs it inside
  transforms of `torch.func`, would run it with W, and the block would get no gradient. The function
  runs by its rule, if it has one, or else gets the computed weight.
- What wraps an argument of `torch.vmap`, `torch.func.grad` and `jvp` would wrap W. It gets the
  computed weight.
- Activation checkpointing, also by the older `CheckpointFunction`, would compute layers again in
  backward, where other contexts are open, or none. What it keeps runs in those of the forward pass.
- `NestedTensor.__torch_function__` would multiply with W. It leaves the function to the weight.
- `nn.init.trunc_normal_` and `.orthogonal_` would write values that contain the update into W. They
  get W.
- `overrides.get_overridable_functions()` lacks private functions, such as the grouped product, so
  compiled code would run them with W. They are added.

`layers.state_dicts` changes `nn.Module.load_state_dict`, for the blocks that a state dict lacks.
`private_torch` has the private names.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from disha import private_torch
from disha.effective.contexts import bind_contexts
from disha.effective.rules import RULES
from disha.effective.weight import EffectiveWeight, compute_inside
from disha.effective.writes import write

_LOCK = threading.Lock()


def install() -> None:
    """Change torch once, however often and from whichever threads this is called."""
    with _LOCK:
        _install()


@functools.cache  # so that a second call does nothing
def _install() -> None:
    function_class = private_torch.class_with_apply()
    nested_tensor = private_torch.require(private_torch.NESTED_TENSOR)
    # All places are looked up before anything is changed, because one may be missing.
    originals = {place: private_torch.require(place) for place in _CHANGES}

    function_class.apply = classmethod(_make_apply(function_class))
    _leave_functions_to_weights(nested_tensor)
    for place, change in _CHANGES.items():
        module, _, name = place.partition(":")
        setattr(sys.modules[module], name, change(originals[place]))
    private_torch.ask_private_operations()


def _make_apply(function_class: Any) -> Callable[..., Any]:
    """Return the `apply` of custom functions that does what the module's docstring says."""

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        rule = RULES.get(cls.__name__)
        result = NotImplemented if rule is None else rule(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if cls.__name__ == "CheckpointFunction" and cls.__module__ in _CHECKPOINTS:
            position = _CHECKPOINTS[cls.__module__]
            function = bind_contexts(args[position])
            args = (*args[:position], function, *args[position + 1 :])
        # The `apply` of torch, which this one hides.
        torch_apply = super(function_class, cls).apply
        return torch_apply(*compute_inside(args), **compute_inside(kwargs))

    private_torch.start_no_graph(apply)
    return apply


_CHECKPOINTS = {
    "torch.utils.checkpoint": 0,
    "deepspeed.runtime.activation_checkpointing.checkpointing": 0,
    "megatron.core.tensor_parallel.random": 0,
    "fairscale.nn.checkpoint.checkpoint_activations": 1,
}
"""Module with a `CheckpointFunction` -> the position of its argument that backward runs again."""


def _leave_functions_to_weights(tensor_class: Any) -> None:
    """Make a class of tensors leave a function to an effective weight among its arguments."""
    answer = vars(tensor_class)["__torch_function__"].__func__

    def answer_or_leave(
        cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(other, EffectiveWeight) for other in types):
            return NotImplemented
        return answer(cls, func, types, args, kwargs)

    tensor_class.__torch_function__ = classmethod(answer_or_leave)


# Each of these gets a function of torch, and returns what replaces it.


def _compute_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    """Pass computed weights to the function."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*compute_inside(args), **compute_inside(kwargs))

    return run


def _compute_outside_transform(function: Callable[..., Any]) -> Callable[..., Any]:
    """Pass computed weights to the function, computed outside of the transform."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*_compute_outside(args), **_compute_outside(kwargs))

    return run


def _compute_outside(args: Any) -> Any:
    """Return the arguments of a transform, computed as if it had not begun."""
    if torch.compiler.is_compiling():
        return compute_inside(args)
    with private_torch.require(private_torch.OUTSIDE_TRANSFORMS)():
        return compute_inside(args)


def _keep_contexts(keep: Callable[..., Any]) -> Callable[..., Any]:
    """Let backward run the function that is kept in the contexts of the forward pass."""

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return keep(bind_contexts(function), *args, **kwargs)

    return run


def _write_base(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function of `nn.init` read and write W."""
    return functools.partial(write, function)


_CHANGES: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "torch.autograd.function:custom_function_call": _compute_arguments,
    private_torch.ADD_BATCH_DIM: _compute_outside_transform,
    private_torch.WRAP_FOR_GRAD: _compute_outside_transform,
    private_torch.CHECKPOINT: _keep_contexts,
    private_torch.TRUNC_NORMAL: _write_base,
    "torch.nn.init:orthogonal_": _write_base,
}
"""Place "module:name" of a function of torch -> what makes its replacement."""
