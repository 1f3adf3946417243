"""The loss on examples that are not trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from disha.finetune.data.batches import batch_by_length
from disha.finetune.data.examples import Example
from disha.finetune.training.objectives import Objective

__all__ = ["mean_loss"]

BATCH = 16


def mean_loss(objective: Objective, examples: Sequence[Example]) -> float:
    """Cross-entropy per supervised token over all `examples`, in nats.

    The model is in evaluation mode meanwhile, and in its former mode afterwards.

    Args:
        objective: of the language model, with or without adapters.
        examples: at least one.
    """
    was_training = objective.training
    objective.eval()
    try:
        return _mean_loss(objective, examples)
    finally:
        objective.train(was_training)


@torch.inference_mode()
def _mean_loss(objective: Objective, examples: Sequence[Example]) -> float:
    device = next(objective.parameters()).device
    total, tokens = 0.0, 0
    for batch in batch_by_length(examples, BATCH):
        total += float(objective(batch.to(device)))
        tokens += batch.weight
    return total / tokens
