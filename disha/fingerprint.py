"""A fingerprint of a base weight: tells whether an adapter meets the base it was trained on.

It reads a fixed number of values, not the whole weight, so that its cost does not grow with the
model. The same base may be stored in float32, bfloat16 or float16, and rounding twice is not
rounding once: so there are two digests, of the values rounded to bfloat16 directly and by way of
float16, and two fingerprints are of one base if they share either.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from disha.sharding import values_at

__all__ = ["fingerprint", "same_base"]

SAMPLES = 64
HALF = 8


def fingerprint(weight: Tensor) -> str | None:
    """Return 16 hexadecimal digits for a weight, or None where its values can't be read.

    Collective if the weight is sharded: all ranks take part, and get the whole weight's.

    Args:
        weight: any floating-point tensor; one on the meta device has no values.

    Examples:
        >>> import torch
        >>> from disha.fingerprint import fingerprint, same_base
        >>> weight = torch.linspace(0, 1, 6).view(2, 3)
        >>> same_base(fingerprint(weight), fingerprint(weight.half()))
        True
        >>> same_base(fingerprint(weight), fingerprint(weight + 1))
        False
    """
    if weight.is_meta or not weight.is_floating_point() or not weight.numel():
        return None
    count = min(SAMPLES, weight.numel())
    steps = torch.arange(count, device=weight.device)
    positions = steps * (weight.numel() - 1) // max(count - 1, 1)
    with torch.no_grad():
        values = values_at(weight.detach(), positions).cpu()
        rounded = (values.to(torch.bfloat16), values.to(torch.float16).to(torch.bfloat16))
    return "".join(_digest(tuple(weight.shape), one) for one in rounded)


def _digest(shape: tuple[int, ...], values: Tensor) -> str:
    digest = hashlib.sha256(str(shape).encode())
    digest.update(bytes(values.view(torch.uint8).tolist()))
    return digest.hexdigest()[:HALF]


def same_base(first: str, second: str) -> bool:
    """Return whether two fingerprints are of one base, in the same or in different dtypes.

    Args:
        first: a fingerprint.
        second: another.
    """
    halves = {first[:HALF], first[HALF:]}
    return not halves.isdisjoint({second[:HALF], second[HALF:]})
