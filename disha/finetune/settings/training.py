"""How the rows are learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from disha.finetune.settings.checks import (
    require,
    require_at_least,
    require_part,
    require_positive,
)
from disha.finetune.settings.flags import Switch

__all__ = ["ScheduleName", "Strategy", "TrainingSettings"]

ScheduleName = Literal["cosine", "linear", "constant"]
Strategy = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class TrainingSettings:
    """Training."""

    num_train_epochs: float = 1.0
    """Passes over the rows, unless max_steps is given."""

    max_steps: int = -1
    """Optimiser steps; -1: as num_train_epochs says."""

    per_device_train_batch_size: int = 4
    """Rows per batch."""

    gradient_accumulation_steps: int = 1
    """Batches per optimiser step, on each process. The result is that of one large batch."""

    learning_rate: float = 2e-4
    """The highest learning rate."""

    lr_scheduler_type: ScheduleName = "cosine"
    """How the learning rate goes on after the warm-up: down to zero as a cosine or a line, or
    constant."""

    warmup_ratio: float = 0.03
    """Part of the steps in which the learning rate rises."""

    weight_decay: float = 0.0
    """AdamW's weight decay."""

    max_grad_norm: float = 1.0
    """Scale gradients down to this norm; 0: leave them as they are."""

    seed: int = 0
    """Decides the order of the rows and which are held out."""

    bf16: Switch = False
    """Compute in bfloat16 where that is safe (autocast), whatever the base model is kept in."""

    tf32: Switch = False
    """Let CUDA compute float32 products in TF32."""

    gradient_checkpointing: Switch = False
    """Keep the inputs of layers only, and compute the rest again for backward: less memory, more
    time."""

    compile: Switch = False
    """Compile the model with torch.compile."""

    strategy: Strategy = "ddp"
    """How several processes (torchrun) share the work: ddp gives each the whole model, fsdp a
    part of it."""

    def check(self) -> None:
        """Check every setting by itself.

        Raises:
            SettingsError: one is out of range.
        """
        require_at_least(1, self, ["per_device_train_batch_size", "gradient_accumulation_steps"])
        require_positive(self, ["learning_rate", "num_train_epochs"])
        require_at_least(0, self, ["weight_decay", "max_grad_norm"])
        require_part(self, ["warmup_ratio"])
        require(0 <= self.seed < 2**62, "seed", self.seed, "from 0 to 2^62 - 1")
        require(
            self.max_steps >= 1 or self.max_steps == -1,
            "max_steps",
            self.max_steps,
            "at least 1, or -1 to go by --num_train_epochs",
        )
