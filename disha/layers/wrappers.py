"""What wraps the modules of a model, and the names that wrappers add to its keys."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from disha.private_torch import CHECKPOINTED, COMPILED, FSDP_CHILD
from disha.sharding.imported import imported_class


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


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module that wrappers wrap."""
    for wrapper in WRAPPERS:
        if wrapper.child and isinstance(model, imported_class(wrapper.module, wrapper.name)):
            return unwrap(model._modules[wrapper.child])
    return model


def clean_key(key: str) -> str:
    """Return a state-dict key without the parts that wrappers add."""
    # A model may have a child `module` itself, so only at the start is that name a wrapper's.
    added = {wrapper.child for wrapper in WRAPPERS if wrapper.child != "module"}
    parts = [part for part in key.split(".") if part not in added]
    return ".".join(parts).removeprefix("module.")
