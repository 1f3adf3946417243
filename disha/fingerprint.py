"""A fingerprint of a base weight: it shows whether an adapter is on the base it was trained on.

It reads a fixed number of values, so its cost does not grow with the weight. The same base may be
stored in float32, bfloat16 or float16, and rounding twice can differ from rounding once. So a
fingerprint has two digests: of the values rounded to bfloat16, and of the values rounded to float16
and then to bfloat16. Two fingerprints belong to the same base if they share a digest.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from disha.sharding import gathered

SAMPLES = 64
HALF = 8


def fingerprint(weight: Tensor) -> str | None:
    """Return 16 hexadecimal digits for a weight, or None if its values can't be read.

    If the weight is sharded, this is collective: all ranks take part and get the same result.
    """
    if weight.is_meta or not weight.is_floating_point():
        return None

    whole = gathered(weight.detach())

    def values(positions: Tensor) -> Tensor:
        # Not torch.take, which lacks the dtypes of 8 bits.
        return whole[torch.unravel_index(positions.to(whole.device), whole.shape)].cpu()

    return fingerprint_of(tuple(weight.shape), values)


def fingerprint_of(shape: tuple[int, ...], values_at: Callable[[Tensor], Tensor]) -> str | None:
    """Return the fingerprint of a weight, given a function that reads values at flat positions."""
    size = math.prod(shape)
    if not size:
        return None
    count = min(SAMPLES, size)
    values = values_at(torch.arange(count, device="cpu") * (size - 1) // max(count - 1, 1))
    rounded = (values.to(torch.bfloat16), values.to(torch.float16).to(torch.bfloat16))
    return "".join(_digest(shape, one) for one in rounded)


def _digest(shape: tuple[int, ...], values: Tensor) -> str:
    digest = hashlib.sha256(str(shape).encode())
    digest.update(bytes(values.view(torch.uint8).tolist()))
    return digest.hexdigest()[:HALF]


def same_base(first: str, second: str) -> bool:
    """Return whether two fingerprints belong to the same base, perhaps in different dtypes."""
    halves = {first[:HALF], first[HALF:]}
    return not halves.isdisjoint({second[:HALF], second[HALF:]})
