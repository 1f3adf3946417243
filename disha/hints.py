"""Arguments that users of other libraries expect, and what they are called here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from disha.errors import ArgumentTypeError

P = ParamSpec("P")
T = TypeVar("T")

NAMES_OF_PEFT = {
    "target_modules": "target_regex",
    "lora_alpha": "scale, which is lora_alpha / r",
    "lora_dropout": "dropout",
    "modules_to_save": "also_train",
    "adapter_name": "adapter",
    "trainable_token_indices": "also_train_rows",
}
"""Argument that users of PEFT expect -> the argument to write instead."""


def with_hints(function: Callable[P, T]) -> Callable[P, T]:
    """Return a function that names the right argument if it gets one of another library.

    It takes `target` for `target_regex`, because a plan, a file and the command call it so.
    """

    @functools.wraps(function)
    def function_with_hints(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs:
            if name in NAMES_OF_PEFT:
                raise ArgumentTypeError(f"there is no argument {name}; write {NAMES_OF_PEFT[name]}")
        if "target" in kwargs and "target_regex" not in kwargs:
            kwargs["target_regex"] = kwargs.pop("target")
        return function(*args, **kwargs)

    return function_with_hints
