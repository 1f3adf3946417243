"""Forward hooks that change the output of a module before other hooks see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["add_first_hook", "remove_first_hook"]


def add_first_hook(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Call a hook with keyword arguments after each forward, before all existing hooks."""
    module.register_forward_hook(hook, with_kwargs=True, prepend=True)


def remove_first_hook(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Undo `add_first_hook`, also in a copy of the module, which has no handle."""
    for number in [n for n, own in module._forward_hooks.items() if own is hook]:
        del module._forward_hooks[number]
        module._forward_hooks_with_kwargs.pop(number, None)
