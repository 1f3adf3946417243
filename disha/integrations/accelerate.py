"""States of an `Accelerator` of `accelerate` that hold the adapter and not the base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

import disha
from disha.files import ADAPTER_NAME
from disha.integrations.engines import kept_keys, leave_out_base

__all__ = ["keep_adapter_only"]


def keep_adapter_only(accelerator: Accelerator, model: nn.Module, adapter: str = "default") -> None:
    """Let `save_state` write the adapter instead of the model, and `load_state` read it.

    Call it once, before or after `accelerator.prepare`. Optimizers, schedulers and random states
    are saved and loaded as before, so that training resumes bit for bit. FSDP2 and DeepSpeed write
    and read what trains in files of their own, beside that of the adapter.

    Args:
        accelerator: the accelerator.
        model: the model with the adapter, as it is before `prepare`.
        adapter: the adapter's name.

    Raises:
        ArgumentError: the model has no such adapter, or another one is active and trains.

    Examples:
        >>> import pathlib, tempfile
        >>> from accelerate import Accelerator
        >>> from torch import nn
        >>> import disha
        >>> from disha.integrations.accelerate import keep_adapter_only
        >>> model = disha.inject_adapters(nn.Sequential(nn.Linear(8, 4)), "0", r=4)
        >>> accelerator = Accelerator(cpu=True)
        >>> keep_adapter_only(accelerator, model)
        >>> model = accelerator.prepare(model)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = accelerator.save_state(folder)
        ...     accelerator.load_state(folder)
        ...     sorted(path.name for path in pathlib.Path(folder).glob("*.safetensors"))
        ['adapter.safetensors']
    """
    leave_out_base(model, kept_keys(model, adapter), accelerator.distributed_type)

    def take_out(items: list[Any], models: list[nn.Module]) -> None:
        """Take what belongs to the model out of a list, which is in the order of the models."""
        for position, other in enumerate(models):
            if accelerator.unwrap_model(other) is model:
                del items[position : position + 1]  # FSDP and DeepSpeed list no weights
                return  # `items` may be `models`

    def save(models: list[nn.Module], weights: list[Mapping[str, Any]], folder: str) -> None:
        take_out(weights, models)
        disha.save_adapter(model, Path(folder) / ADAPTER_NAME, adapter)

    def load(models: list[nn.Module], folder: str) -> None:
        take_out(models, models)
        if accelerator.distributed_type not in ("DEEPSPEED", "FSDP"):
            disha.load_adapter(model, Path(folder) / ADAPTER_NAME, adapter, replace=True)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
