"""The hooks of accelerate that keep a weight elsewhere between forwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def device_of_weight(module: nn.Module, weight: Tensor) -> torch.device:
    """Return the device of a weight, or the one to which accelerate loads it for each forward."""
    if weight.is_meta:
        for hook in offloading_hooks(module):
            if hook.execution_device is not None and not hook.place_submodules:
                return torch.device(hook.execution_device)
    return weight.device


def offloading_hooks(module: nn.Module) -> list[Any]:
    """Return the hooks of accelerate that load weights for a forward of this module."""
    hook = module.__dict__.get("_hf_hook")
    parts = getattr(hook, "hooks", (hook,))  # of a sequence of hooks
    return [part for part in parts if getattr(part, "offload", False) is True]
