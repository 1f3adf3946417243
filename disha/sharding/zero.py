"""Parameters that DeepSpeed manages: ZeRO-3 partitions them, and its optimizers train a copy.

    stage       the parameter                             the optimizer
    ZeRO-1, -2  has all values, on every rank             has a part of a copy in float32
    ZeRO-3      is empty, except while its module runs    has a part of a copy in float32

So a parameter of ZeRO-3 does not show its shape, and a write must go into parameter and copy.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from disha.sharding.imported import imported_class


def is_partitioned(tensor: object) -> TypeGuard[Any]:
    """Whether ZeRO-3 manages a parameter, whose values are absent most of the time."""
    return hasattr(tensor, "ds_id")


def whole_shape(tensor: Tensor) -> torch.Size:
    """Return the shape that a tensor has with all of its values."""
    return getattr(tensor, "ds_shape", tensor.shape)


def gathered_parameter(tensor: Tensor, writes: bool = False) -> AbstractContextManager[Any]:
    """Return a context in which a parameter of ZeRO-3 has its values.

    With `writes`, the values that rank 0 writes in the context are kept.
    """
    if not is_partitioned(tensor):
        return nullcontext()
    cls = imported_class("deepspeed.runtime.zero.partition_parameters", "GatheredParameters")
    if writes:
        return cls([tensor], modifier_rank=0)
    has_values = tensor.shape == whole_shape(tensor)
    return nullcontext() if has_values else cls([tensor], modifier_rank=None)


def gather_partition(tensor: Tensor) -> Tensor:
    """Return a tensor, or a copy with all values if ZeRO-3 manages it. Collective for ZeRO-3."""
    if not is_partitioned(tensor):
        return tensor
    with gathered_parameter(tensor):
        return tensor.detach().clone()


def repartition(parameters: Iterable[Tensor]) -> None:
    """Let ZeRO-3 partition what it still holds after a backward that no engine has started."""
    optimizers = {getattr(parameter, "_z3_optimizer", None) for parameter in parameters}
    for optimizer in optimizers:
        if optimizer is not None:
            optimizer.empty_partition_cache()


def read_trained_values(parameter: Any) -> Tensor | None:
    """Return the values that an optimizer of DeepSpeed trains, or None. Collective."""
    if _trains_by_zero_3(parameter):
        return parameter._z3_optimizer.get_full_hp_param(parameter)
    return parameter.get_full_hp_param() if hasattr(parameter, "_hp_mapping") else None


def _trains_by_zero_3(parameter: Any) -> bool:
    optimizer = getattr(parameter, "_z3_optimizer", None)
    return optimizer is not None and optimizer.get_param_id(parameter) in optimizer.grad_position


def restart_trace(parameter: Any) -> None:
    """Make ZeRO-3 record anew which parameters a step reads, if it does not know of a block yet.

    It gathers only what it has recorded, and a block may act for the first time after that.
    """
    if not parameter.numel() and _trains_by_zero_3(parameter):
        order = parameter._z3_optimizer.parameter_offload.param_coordinator
        if order.is_complete_trace():
            order._invalidate_trace()


def write_trained_values(parameter: Any, values: Tensor) -> None:
    """Write the values that an optimizer of DeepSpeed trains, if there is one."""
    if _trains_by_zero_3(parameter):
        size = parameter.ds_tensor.ds_numel  # of the part of each rank; the last one is padded
        rank = torch.distributed.get_rank(parameter.ds_process_group)
        padded = F.pad(values.flatten(), (0, parameter.ds_numel_aligned - values.numel()))
        part = padded[rank * size : (rank + 1) * size]
        parameter._z3_optimizer.set_local_hp_param(part, parameter)
    elif hasattr(parameter, "_hp_mapping"):
        parameter.set_full_hp_param(values)
