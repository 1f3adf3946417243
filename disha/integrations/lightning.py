"""Checkpoints of Lightning that hold the adapter and not the base."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies import ModelParallelStrategy

import disha
from disha.integrations.engines import leave_out_base
from disha.model import buffers
from disha.model.view import ModelView

__all__ = ["AdapterCheckpoints"]


class AdapterCheckpoints(Callback):
    """Keeps the frozen base out of the checkpoints of `Trainer`.

    Resuming (`trainer.fit(..., ckpt_path=...)`) and the best checkpoint
    (`trainer.test(..., ckpt_path="best")`) load the adapter into the module, which must have the
    same adapter. To write a file of the adapter alone, call `disha.save_adapter`.

    Args:
        adapter: the name of the adapter to keep.

    Examples:
        >>> from torch import nn
        >>> from pytorch_lightning import LightningModule, Trainer
        >>> import disha
        >>> from disha.integrations.lightning import AdapterCheckpoints
        >>> module = LightningModule()
        >>> module.net = disha.inject_adapters(nn.Sequential(nn.Linear(8, 4)), "0", r=4)
        >>> checkpoint = {"state_dict": module.state_dict()}
        >>> AdapterCheckpoints().on_save_checkpoint(Trainer(logger=False), module, checkpoint)
        >>> list(checkpoint["state_dict"])
        ['net.0.disha.default.bone_block']
    """

    def __init__(self, adapter: str = "default") -> None:
        self._adapter = adapter

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the module be loaded from a checkpoint without the base."""
        leave_out_base(pl_module, self._kept_keys(pl_module), "FSDP")
        if isinstance(trainer.strategy, ModelParallelStrategy):
            pl_module.strict_loading = False  # it would look for each key of the model

    def _kept_keys(self, module: LightningModule) -> set[str]:
        """Return the keys of all that trains: the adapter, and perhaps a head beside it.

        Buffers that have changed are among them.
        """
        trained = {key for key, parameter in module.named_parameters() if parameter.requires_grad}
        changed = buffers.list_unsaved(ModelView(module))
        return trained.union(changed, disha.adapter_state_dict(module, self._adapter))

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the part of the state dict that trains."""
        state = checkpoint["state_dict"]
        kept = self._kept_keys(pl_module)
        checkpoint["state_dict"] = {key: state[key] for key in state if key in kept}
