"""What disha changes in torch: functions that take tensors without asking their class.

The first injection calls `install`; importing changes nothing. Without this, the adapter would not
act, or another one would, without a word:

    the `apply` of a custom function of autograd    runs it, with W and no gradient; one called
                                                    `CheckpointFunction` is checkpointing, below
    autograd.function.custom_function_call          does the same inside transforms of `torch.func`
    what wraps an argument of `torch.vmap`,         wraps W
    `torch.func.grad` and `jvp`
    what keeps a function for activation            runs it again in backward, where another
    checkpointing                                   context is open, or none
    overrides.get_overridable_functions()           what the compiler asks; private functions, such
                                                    as the grouped product, are not in this list

The first ones get the computed weight; a custom function for which there is a rule, that rule.
Checkpointing computes again in the contexts of the forward pass. The private functions are added to
the list. `private_torch` has the private names.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from disha import private_torch
from disha.effective.contexts import in_these_contexts
from disha.effective.rules import RULES
from disha.effective.weight import computed_inside

_LOCK = threading.Lock()


def install() -> None:
    """Change torch once, however often and from whichever threads this is called."""
    with _LOCK:
        _install()


@functools.cache
def _install() -> None:
    inner = private_torch.class_with_apply()
    # Before anything is changed, because a place may be missing.
    originals = {place: private_torch.required(place) for place in _CHANGES}

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        rule = RULES.get(cls.__name__)
        result = NotImplemented if rule is None else rule(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if cls.__name__ == "CheckpointFunction":  # the reentrant one, also of DeepSpeed
            args = in_these_contexts(args)
        return super(inner, cls).apply(*computed_inside(args), **computed_inside(kwargs))

    private_torch.start_no_graph(apply)
    inner.apply = classmethod(apply)
    for place, change in _CHANGES.items():
        module, _, name = place.partition(":")
        setattr(sys.modules[module], name, _getting(change, originals[place]))
    private_torch.ask_private_operations()


def _getting(change: Callable[[Any], Any], function: Callable[..., Any]) -> Any:
    """Return a function that gets changed arguments."""
    return lambda *args, **kwargs: function(*change(args), **kwargs)


def _computed_outside(args: Any) -> Any:
    """Return the arguments of a transform, computed before the transform began."""
    if torch.compiler.is_compiling():
        return computed_inside(args)
    with private_torch.required(private_torch.OUTSIDE_TRANSFORMS)():
        return computed_inside(args)


_CHANGES: dict[str, Callable[[Any], Any]] = {
    "torch.autograd.function:custom_function_call": computed_inside,
    private_torch.ADD_BATCH_DIM: _computed_outside,
    private_torch.WRAP_FOR_GRAD: _computed_outside,
    private_torch.CHECKPOINT: in_these_contexts,
}
"""Function of torch -> how its arguments change."""
