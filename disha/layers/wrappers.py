"""What wraps the modules of a model, and the names that wrappers add to its keys."""

from __future__ import annotations

import sys
from typing import NamedTuple

from torch import nn

from disha.private_torch import CHECKPOINTED, COMPILED, FSDP_CHILD


class Wrapper(NamedTuple):
    """A class of torch or DeepSpeed that wraps a module."""

    module: str  # where the class is defined
    name: str
    child: str  # the attribute that holds the wrapped module; empty if the module changes its class
    distributes: bool = False  # keeps track of parameters, so that none may be added or removed
    shards: bool = False  # replaces parameters by shards


FSDP = "torch.distributed.fsdp"
WRAPPERS = (
    Wrapper(*COMPILED),
    Wrapper(*CHECKPOINTED),
    Wrapper("torch.nn.parallel.distributed", "DistributedDataParallel", "module", distributes=True),
    Wrapper("torch.optim.swa_utils", "AveragedModel", "module"),
    Wrapper("torch.nn.parallel.data_parallel", "DataParallel", "module", distributes=True),
    Wrapper("deepspeed.runtime.engine", "DeepSpeedEngine", "module", distributes=True),
    Wrapper(FSDP, "FullyShardedDataParallel", FSDP_CHILD, distributes=True, shards=True),
    Wrapper(FSDP, "FSDPModule", "", distributes=True, shards=True),
)


def imported_wrappers() -> list[tuple[type, Wrapper]]:
    """Return the classes of wrappers that are imported, and what they are."""
    found = []
    for wrapper in WRAPPERS:
        cls = getattr(sys.modules.get(wrapper.module), wrapper.name, None)
        if cls is not None:
            found.append((cls, wrapper))
    return found


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module that wrappers wrap."""
    for cls, wrapper in imported_wrappers():
        if wrapper.child and isinstance(model, cls):
            return unwrap(model.get_submodule(wrapper.child))
    return model


def clean_key(key: str) -> str:
    """Return a state-dict key without the parts that wrappers add."""
    # A model may have a child `module` itself, so only at the start is that name a wrapper's.
    added = {wrapper.child for wrapper in WRAPPERS if wrapper.child != "module"}
    parts = [part for part in key.split(".") if part not in added]
    return ".".join(parts).removeprefix("module.")
