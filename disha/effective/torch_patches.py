"""What disha changes in torch: functions that take tensors without asking their class.

The first injection calls `install`; importing changes nothing. An effective weight reaches these
functions as W alone, so the adapter would not act, without a word:

    autograd.function._SingleLevelFunction.apply   runs a custom function, with W and no gradient;
                                                   since torch 2.15, `Function.apply`
    autograd.function.custom_function_call         does the same inside transforms of `torch.func`
    vmap._add_batch_dim                            wraps an argument of `torch.vmap`
    eager_transforms._wrap_for_grad                wraps an argument of `torch.func.grad` and `jvp`
    overrides.get_overridable_functions()          what the compiler asks; private functions, such
                                                   as `torch._grouped_mm`, are not in this list

The first four get the computed weight; a custom function for which there is a rule, that rule. The
private functions are added to the list.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch._functorch import eager_transforms, vmap
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd import function as autograd

from disha.effective.rules import RULES
from disha.effective.weight import EffectiveWeight, computed, computed_inside, start_no_graph

_LOCK = threading.Lock()


def install() -> None:
    """Change torch once, however often and from whichever threads this is called."""
    with _LOCK:
        _install()


@functools.cache
def _install() -> None:
    # Before torch 2.15, the base is changed: a module may have kept the other (`f = Fused.apply`).
    in_python = hasattr(vars(autograd.Function)["apply"], "__func__")
    inner: Any = autograd._SingleLevelFunction if in_python else autograd.Function

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        own = RULES.get(cls.__name__)
        result = NotImplemented if own is None else own(*args, **kwargs)
        if result is not NotImplemented:
            return result
        return super(inner, cls).apply(*computed_inside(args), **computed_inside(kwargs))

    start_no_graph(apply)
    inner.apply = classmethod(apply)
    for module, name, change in (
        (autograd, "custom_function_call", computed_inside),
        (vmap, "_add_batch_dim", _computed_outside),
        (eager_transforms, "_wrap_for_grad", _computed_outside),
    ):
        setattr(module, name, _getting(change, getattr(module, name)))
    _ask_private_functions()


def _getting(change: Callable[[Any], Any], function: Callable[..., Any]) -> Any:
    """Return a function that gets changed arguments."""
    return lambda *args, **kwargs: function(*map(change, args), **kwargs)


def _computed_outside(value: Any) -> Any:
    """Return an argument of a transform, computed before the transform began."""
    if not isinstance(value, EffectiveWeight) or torch.compiler.is_compiling():
        return computed_inside(value)
    with temporarily_pop_interpreter_stack():
        return computed(value)


def _ask_private_functions() -> None:
    listed = torch.overrides.get_overridable_functions()[torch]
    names = (name for name in dir(torch._C._VariableFunctions) if not name.startswith("__"))
    functions = {getattr(torch, name) for name in names if name[0] == "_" and hasattr(torch, name)}
    listed.extend(functions.difference(listed))
    compiler = sys.modules.get("torch._dynamo.variables.torch")
    if compiler is not None:  # it keeps a copy of the list
        compiler.get_overridable_functions().update(functions)
