"""A fingerprint of a base weight: it shows whether an adapter is on the base it was trained on.

It reads a fixed number of values. The same base may be stored in float32, bfloat16 or float16, so
there are two digests: of the values rounded to bfloat16, and of those rounded to float16 and then
to bfloat16. Two fingerprints belong to the same base if they share a digest.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from disha.sharding import gathered

SAMPLES = 64
HALF = 8


def fingerprint(weight: Tensor) -> str | None:
    """Return 16 hexadecimal digits for a weight, or None; collective if it is sharded."""
    if weight.is_meta or not weight.is_floating_point() or not weight.numel():
        return None
    whole = gathered(weight.detach())
    count = min(SAMPLES, whole.numel())
    positions = torch.arange(count, device=whole.device)
    positions = positions * (whole.numel() - 1) // max(count - 1, 1)
    indices: list[Tensor] = []
    for size in reversed(whole.shape):
        indices.insert(0, positions % size)
        positions = positions // size
    values = whole[tuple(indices)].cpu()  # not torch.take, which lacks the dtypes of 8 bits
    digests = []
    for rounded in (values.to(torch.bfloat16), values.to(torch.float16).to(torch.bfloat16)):
        digest = hashlib.sha256(str(tuple(weight.shape)).encode())
        digest.update(bytes(rounded.view(torch.uint8).tolist()))
        digests.append(digest.hexdigest()[:HALF])
    return "".join(digests)


def same_base(first: str, second: str) -> bool:
    """Return whether two fingerprints belong to the same base, perhaps in different dtypes."""
    halves = {first[:HALF], first[HALF:]}
    return not halves.isdisjoint({second[:HALF], second[HALF:]})
