"""The loss on examples that are not trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from disha.finetune.data.examples import Example, batch_by_length
from disha.finetune.models.decoder import Decoder

__all__ = ["mean_loss"]

BATCH = 16


def mean_loss(model: Decoder, examples: Sequence[Example]) -> float:
    """Cross-entropy per supervised token over all `examples`, in nats.

    The model is in evaluation mode meanwhile, and in its former mode afterwards.

    Args:
        model: the language model, with or without adapters.
        examples: at least one.
    """
    was_training = model.training
    model.eval()
    try:
        return _mean_loss(model, examples)
    finally:
        model.train(was_training)


@torch.inference_mode()
def _mean_loss(model: Decoder, examples: Sequence[Example]) -> float:
    device = model.lm_head.weight.device
    total, tokens = 0.0, 0
    for batch in batch_by_length(examples, BATCH):
        loss = model.summed_loss(batch.tokens.to(device), batch.labels.to(device))
        total += float(loss)
        tokens += batch.supervised
    return total / tokens
