"""The hooks of accelerate that keep a weight elsewhere between forwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def device_in_forward(module: nn.Module, device: torch.device) -> torch.device:
    """Return the device to which accelerate loads a weight for each forward, or the present one."""
    for hook in offloading_hooks(module):
        if hook.execution_device is not None and not hook.place_submodules:
            return torch.device(hook.execution_device)
    return device


def offloading_hooks(module: nn.Module) -> list[Any]:
    """Return the hooks of accelerate that load weights for a forward of this module."""
    hook = module.__dict__.get("_hf_hook")
    parts = getattr(hook, "hooks", (hook,))  # of a sequence of hooks
    return [part for part in parts if getattr(part, "offload", False) is True]
