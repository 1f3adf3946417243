"""Writes: done to W. The result is again an effective weight."""

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


def _writes(name: str) -> bool:
    """Whether an operation of this name writes into its first argument: `copy_`, `__iadd__`."""
    if name.startswith("__i"):
        return hasattr(Tensor, f"__{name[3:]}")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _all_writes() -> Iterator[Operation]:
    """Yield every operation of torch that writes into its first argument."""
    for owner in (Tensor, torch, NATIVE_FUNCTIONS, F, torch.nn.init):
        for name in dir(owner):
            operation = getattr(owner, name, None)
            if _writes(name) and callable(operation):
                yield operation
    for name in dir(Tensor):
        operation = getattr(Tensor, name)
        if isinstance(operation, GetSetDescriptorType):  # as in `weight.grad = ...`
            yield operation.__set__


@rule_with_operation(*_all_writes())
def write(func: Operation, *args: Any, **kwargs: Any) -> Any:
    """Write into W. The result is the effective weight of W as it is then."""
    if args:
        written = args[0]
        if func.__name__ in RESHAPES:
            refuse_to_reshape(written)
        result = compute_first(func, (base_inside(written), *_sources(*args)), kwargs)
    else:
        name, written = next(iter(kwargs.items()))
        result = compute_first(func, (), {**kwargs, name: base_inside(written)})
    return result if result is None else written


def _sources(written: Any, *sources: Any) -> tuple[Any, ...]:
    """Return the values to write: W in place of a tensor whose updates would act twice."""
    if not isinstance(written, EffectiveWeight):
        return sources
    return tuple(
        source.base
        if isinstance(source, EffectiveWeight) and _same_blocks(source, written)
        else source
        for source in sources
    )


def _same_blocks(weight: EffectiveWeight, other: EffectiveWeight) -> bool:
    """Whether two effective weights have the updates of the same blocks."""
    mine = weight.updates.every
    theirs = other.updates.every
    same = all(a.block.is_set_to(b.block) for a, b in zip(mine, theirs))
    return same and len(mine) == len(theirs)


@rule(Tensor.data.__set__)  # type: ignore[attr-defined]
def _set_data(weight: Any, value: Any) -> None:
    # `weight.data = weight.data.half()` casts W without adding an update to it.
    if value.shape != weight.shape:
        refuse_to_reshape(weight)
    write(Tensor.data.__set__, weight, value)  # type: ignore[attr-defined]
