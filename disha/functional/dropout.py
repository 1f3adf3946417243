"""Dropout of an update's inputs: of all numbers, or of whole tokens for a lookup."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def drop_inputs(x: Tensor, dropout: float) -> Tensor:
    """Zero each input with this probability, and scale the others up, as `F.dropout` does."""
    if x.is_complex():  # torch's dropout knows real numbers only
        return x * F.dropout(torch.ones_like(x.real), dropout)
    return F.dropout(x, dropout)


def drop_tokens(output: Tensor, dropout: float) -> Tensor:
    """Zero the update of each token with this probability, as dropping its one-hot input would."""
    if not dropout:
        return output
    return output * F.dropout(torch.ones_like(output[..., :1]), dropout)
