"""Take forward hooks off a module by their function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def remove_hook(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Remove a forward hook, also from a copy of the module, for which there is no handle."""
    for number in [n for n, own in module._forward_hooks.items() if own is hook]:
        del module._forward_hooks[number]
        module._forward_hooks_with_kwargs.pop(number, None)
