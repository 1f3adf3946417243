"""What is minimised: the summed loss of a batch, for each kind of model.

A loss is summed, not averaged, so that the steps of training can divide by the terms of all
batches, on all processes, at once. An objective is a module around its model, so that what wraps
modules (DDP, FSDP, autocast, torch.compile) wraps one call per batch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from disha.finetune.data.batches import TokenBatch
from disha.finetune.models.decoder import Decoder

__all__ = ["DecoderObjective", "Objective"]


class Objective(nn.Module):
    """The summed loss of a model's batches.

    Args:
        model: the model, with or without adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Tensor:
        """The loss summed over the terms of `batch`, which are `batch.weight`; a float32 scalar."""
        raise NotImplementedError


class DecoderObjective(Objective):
    """Cross-entropy of the tokens to learn, for our own decoder."""

    model: Decoder

    def forward(self, batch: TokenBatch) -> Tensor:
        """The loss summed over the positions that have a label, in nats."""
        return self.model.summed_loss(batch.tokens, batch.labels, batch.positions)
