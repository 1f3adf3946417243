"""The tables of rules: what each operation does with an effective weight.

A rule is a function with its operations in a decorator above it. The tables build themselves.
`torch.compile` traces rules, so a rule does only what dynamo can trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import GetSetDescriptorType
from typing import Any, TypeVar

import torch
from torch import Tensor

Operation = Callable[..., Any]
"""A function of torch, or of another library."""

Rule = Callable[..., Any]
"""Runs in place of an operation, with the same arguments.

If it returns NotImplemented, the weight is computed, and the operation itself runs.
"""

RULES: dict[Any, Rule] = {}
"""Operation -> its rule. A later rule replaces an earlier one.

An operation of another library has its name as the key, because it may be imported later.
"""

R = TypeVar("R", bound=Rule)


def _resolve(operations: Sequence[Any]) -> Iterator[Any]:
    """Yield operations. A str has names: of methods of `Tensor`, functions of `torch`, or both."""
    for operation in operations:
        if not isinstance(operation, str):
            yield operation
            continue
        for name in operation.split():
            for owner in (Tensor, torch):
                member = getattr(owner, name, None)
                if isinstance(member, GetSetDescriptorType):
                    yield member.__get__
                elif member is not None:
                    yield member


def rule(*operations: Any) -> Callable[[R], R]:
    """Make a function the rule of operations."""

    def register(function: R) -> R:
        for operation in _resolve(operations):
            RULES[operation] = function
        return function

    return register


def rule_with_operation(*operations: Any) -> Callable[[R], R]:
    """Make a function the rule of operations; it gets the operation before the arguments."""

    def register(function: R) -> R:
        for operation in _resolve(operations):
            RULES[operation] = partial(function, operation)
        return function

    return register
