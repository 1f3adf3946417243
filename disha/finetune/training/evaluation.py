"""The loss on rows that are not trained on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from disha.finetune.data.batches import Batch
from disha.finetune.data.rows import pieces
from disha.finetune.errors import DataError
from disha.finetune.training.machine import computing_in_tf32
from disha.finetune.training.objectives import Objective
from disha.finetune.training.parallel import Processes, undistributed

__all__ = ["Evaluation", "mean_loss"]


@dataclass(frozen=True)
class Evaluation:
    """A mean loss.

    Args:
        loss: the mean; cross-entropies are in nats.
        terms: the number of terms in the mean, such as tokens.
    """

    loss: float
    terms: int


def mean_loss(
    objective: nn.Module,
    batches: Iterable[Batch],
    *,
    processes: Processes | None = None,
    bf16: bool = False,
    tf32: bool = False,
) -> Evaluation:
    """Return the mean loss over all terms of all batches, in evaluation mode.

    Args:
        objective: the model's objective, with or without adapters, distributed or not.
        batches: one or more. All processes get the same batches, and share the work.
        processes: the processes that take part.
        bf16: compute in bfloat16 where that is safe.
        tf32: let CUDA compute float32 products in TF32.

    Raises:
        DataError: there is no batch, or no batch has a term.
        Interrupted: a signal asked one of the processes to stop.
    """
    inner = undistributed(objective)
    was_training = inner.training
    inner.eval()
    try:
        # Inference mode can't be used. Sharded parameters can't be gathered in it. And if the model
        # keeps a tensor that it made there, such as a table of positions, training can't use it.
        with torch.no_grad(), computing_in_tf32(tf32):
            return _mean_loss(inner, batches, processes, bf16)
    finally:
        inner.train(was_training)


def _mean_loss(
    objective: Objective, batches: Iterable[Batch], processes: Processes | None, bf16: bool
) -> Evaluation:
    device = next(objective.parameters()).device
    processes = processes or Processes.alone(device)
    total, terms = torch.zeros((), dtype=torch.float64, device=device), 0
    for group in pieces(batches, processes.world_size):
        processes.check_signals()
        is_own = processes.rank < len(group)
        # A process without its own batch computes too, because sharded models compute together.
        batch = group[processes.rank] if is_own else group[0]
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = objective(batch.to(device))
        if is_own:
            total += loss
        terms += sum(batch.weight for batch in group)
    if terms == 0:
        raise DataError("there is nothing to measure the loss on; give rows with a response")
    [summed] = processes.sum([float(total)])
    return Evaluation(summed / terms, terms)
