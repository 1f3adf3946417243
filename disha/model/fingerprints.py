"""Fingerprints: a few digits that tell one base weight from another."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from disha.functional.shard_sums import is_inexact
from disha.sharding.tensors import gathered

SAMPLES = 64
HALF = 8


def fingerprint(weight: Tensor) -> str | None:
    """Return 16 hexadecimal digits of 64 of a weight's values, or None; collective if sharded.

    The same base may be stored in float32, bfloat16 or float16. So there are two digests: of the
    values rounded to bfloat16, and of those rounded to float16 and then to bfloat16.
    """
    if weight.is_meta or not is_inexact(weight) or not weight.numel():
        return None
    values = gathered(weight.detach())
    count = min(SAMPLES, values.numel())
    # From the first value to the last: position i is i * step // (count - 1).
    step = max(values.numel() - 1, 1)
    positions = torch.arange(0, count * step, step, device=values.device) // max(count - 1, 1)
    # As integers, because torch 2.8 can't take values of 8 bits.
    numbers = values.view(torch.uint8) if values.itemsize == 1 else values
    chosen = numbers.take(positions).cpu().view(values.dtype)
    if chosen.is_complex():
        chosen = torch.view_as_real(chosen).flatten()
    shape = str(tuple(weight.shape)).encode()
    digests = []
    for rounded in (chosen.bfloat16(), chosen.half().bfloat16()):
        content = shape + bytes(rounded.view(torch.uint8).tolist())
        digests.append(hashlib.sha256(content).hexdigest()[:HALF])
    return "".join(digests)


def same_base(first: str, second: str) -> bool:
    """Return whether two fingerprints belong to the same base, perhaps in different dtypes."""
    halves = {first[:HALF], first[HALF:]}
    return not halves.isdisjoint({second[:HALF], second[HALF:]})
