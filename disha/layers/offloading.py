"""accelerate's hooks, which keep weights on another device between forwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def device_in_forward(module: nn.Module, device: torch.device) -> torch.device:
    """Return the device to which accelerate loads a weight for a forward, or else `device`."""
    for hook in offloading_hooks(module):
        if hook.execution_device is not None and not hook.place_submodules:
            return torch.device(hook.execution_device)
    return device


def offloading_hooks(module: nn.Module) -> list[Any]:
    """Return the hooks of accelerate that load this module's weights for each forward."""
    outer_hook = module.__dict__.get("_hf_hook")
    hooks = getattr(outer_hook, "hooks", (outer_hook,))  # accelerate can chain several into one
    return [hook for hook in hooks if getattr(hook, "offload", False) is True]
