"""A fingerprint of a base weight: tells whether an adapter meets the base it was trained on.

It reads a fixed number of values, not the whole weight, so that its cost does not grow with the
model; and it reads them as bfloat16, so that a base stored in float32 and the same base in
bfloat16 agree.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["fingerprint"]

SAMPLES = 64


def fingerprint(weight: Tensor) -> str | None:
    """Return 16 hexadecimal digits for a weight, or None where its values can't be read.

    Args:
        weight: any floating-point tensor; one on the meta device has no values.

    Example:
        >>> import torch
        >>> from disha.fingerprint import fingerprint
        >>> fingerprint(torch.ones(2, 2)) == fingerprint(torch.ones(2, 2, dtype=torch.bfloat16))
        True
        >>> fingerprint(torch.ones(2, 2)) == fingerprint(torch.zeros(2, 2))
        False
    """
    if weight.is_meta or not weight.is_floating_point() or not weight.numel():
        return None
    count = min(SAMPLES, weight.numel())
    steps = torch.arange(count, device=weight.device)
    positions = steps * (weight.numel() - 1) // max(count - 1, 1)
    with torch.no_grad():
        values = torch.take(weight.detach(), positions).to(torch.bfloat16).cpu()
    digest = hashlib.sha256(str(tuple(weight.shape)).encode())
    digest.update(bytes(values.view(torch.uint8).tolist()))
    return digest.hexdigest()[:16]
