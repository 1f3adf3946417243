"""Writes: operations that change W in place. Their result is again an effective weight."""

from __future__ import annotations

from collections.abc import Iterator
from types import GetSetDescriptorType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from disha.effective.rules import Operation, rule, rule_with_operation
from disha.effective.weight import (
    RESHAPES,
    EffectiveWeight,
    base_inside,
    compute_first,
    refuse_to_reshape,
)
from disha.private_torch import NATIVE_FUNCTIONS


def _is_write(name: str) -> bool:
    """Whether an operation of this name writes into its first argument: `copy_`, `__iadd__`."""
    if name.startswith("__i"):  # `__iadd__` is one, because there is an `__add__`
        return hasattr(Tensor, f"__{name[3:]}")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _list_writes() -> Iterator[Operation]:
    """Yield every operation of torch that writes into its first argument."""
    for owner in (Tensor, torch, NATIVE_FUNCTIONS, F, torch.nn.init):
        for name in dir(owner):
            operation = getattr(owner, name, None)
            if _is_write(name) and callable(operation):
                yield operation
    for name in dir(Tensor):
        operation = getattr(Tensor, name)
        if isinstance(operation, GetSetDescriptorType):  # as in `weight.grad = ...`
            yield operation.__set__


@rule_with_operation(*_list_writes())
def write(func: Operation, *args: Any, **kwargs: Any) -> Any:
    """Write into W, which is the first argument. Return its effective weight, if anything."""
    if args:
        written, *others = args
    else:
        # Functions of nn.init, which pass it by name. Other keywords may come before it.
        written = kwargs.pop("tensor")
        others = []
    if func.__name__ in RESHAPES:
        refuse_to_reshape(written)
    into = written
    if func is Tensor.__setitem__ and isinstance(others[-1], EffectiveWeight):
        into = written[others[0]]  # `weight[:2] *= 2` ends in `weight[:2] = weight[:2]`
    sources = [_value_to_write(into, other) for other in others]
    named = {name: _value_to_write(written, other) for name, other in kwargs.items()}
    result = compute_first(func, (base_inside(written), *sources), named)
    return None if result is None else written


def _value_to_write(written: Any, source: Any) -> Any:
    """Return a source, or its W if it has the written weight's updates: they would act twice."""
    if not isinstance(written, EffectiveWeight) or not isinstance(source, EffectiveWeight):
        return source
    is_the_same = source.base.is_set_to(written.base)  # parts of blocks may be copies
    return source.base if is_the_same or _have_same_blocks(source, written) else source


def _have_same_blocks(weight: EffectiveWeight, other: EffectiveWeight) -> bool:
    """Whether two effective weights have the updates of the same blocks."""
    mine = weight.updates.blocks
    theirs = other.updates.blocks
    if len(mine) != len(theirs):
        return False
    return all(a.is_set_to(b) for a, b in zip(mine, theirs))


@rule(Tensor.data.__set__)  # type: ignore[attr-defined]
def _set_data(weight: Any, value: Any) -> None:
    # `weight.data = weight.data.half()` casts W without adding an update to it.
    if value.shape != weight.shape:
        refuse_to_reshape(weight)
    write(Tensor.data.__set__, weight, value)  # type: ignore[attr-defined]
