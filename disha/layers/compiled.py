"""How compiled code learns which adapters act: it reads attributes of this module.

`torch.compile` can't trace a context variable. But an attribute of a Python module is an input of
the graph, read anew on every call through this module's `__getattr__`. Each group of layers has two
such attributes:

    <group>                what acts on the layers (`contexts.Override`); None for the active
                           adapters, and while adapters are disabled; but () while blocks are
                           disabled that are not finite, because 0 times NaN is NaN
    <group>_on_<device>    a tensor by which scales are multiplied: 0 while adapters are disabled,
                           otherwise 1, so that disabling them compiles nothing again
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from disha.effective.contexts import (
    GROUPS_BY_NAME,
    OPEN_CONTEXTS,
    Context,
    Group,
    current_context,
)
from disha.private_torch import start_no_graph
from disha.sharding.tensors import local_part


def factor_name(group: str, device: torch.device) -> str:
    """Return the name of the attribute that holds the factor of a group on a device."""
    return f"{group}_on_{device.type}_{device.index or 0}"


def __getattr__(name: str) -> Any:
    group_name, _, device = name.partition("_on_")
    group = GROUPS_BY_NAME.get(group_name)
    if group is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    context = current_context(group) if OPEN_CONTEXTS else None
    if device:
        return _get_factor(group, device, disables=context is not None and context.disables)
    if context is None:
        return None
    if context.disables and _blocks_are_finite(context, group):
        return None
    return context.override


start_no_graph(__getattr__)


def _blocks_are_finite(context: Context, group: Group) -> bool:
    """Whether 0 times each block of a group is 0, which is asked once in a context."""
    if torch.compiler.is_exporting():
        return True  # an exported program can't depend on the values of blocks
    if group not in context.finite:
        sums = [
            local_part(block.block.detach()).sum()
            for adapters in list(group.members)
            for block in adapters.blocks_by_name().values()
            if not block.block.is_meta
        ]
        # A finite sum has finite terms.
        context.finite[group] = all(bool(total.isfinite()) for total in sums)
    return context.finite[group]


def _get_factor(group: Group, device: str, disables: bool) -> Tensor | float:
    """Return the factor of a group on a device, such as `cuda_0`."""
    # An exported program can't have a tensor of this module as an input: it keeps the number.
    if torch.compiler.is_exporting():
        return float(not disables)
    key = device, disables
    if key not in group.factors:
        with torch.inference_mode(False):
            factor = torch.full((), float(not disables), device=device.replace("_", ":"))
        group.factors[key] = factor
    return group.factors[key]
