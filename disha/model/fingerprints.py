"""Fingerprints: a few digits that tell one base weight from another."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from disha.sharding.tensors import gathered

SAMPLES = 64
HALF = 8


def fingerprint(weight: Tensor) -> str | None:
    """Return 16 hexadecimal digits of 64 of a weight's values, or None; collective if sharded.

    The same base may be stored in float32, bfloat16 or float16. So there are two digests: of the
    values rounded to bfloat16, and of those rounded to float16 and then to bfloat16.
    """
    if weight.is_meta or not weight.is_floating_point() or not weight.numel():
        return None
    whole = gathered(weight.detach())
    count = min(SAMPLES, whole.numel())
    positions = torch.arange(count, device=whole.device)
    positions = positions * (whole.numel() - 1) // max(count - 1, 1)
    # By their bytes, because torch 2.8 can't pick values of 8 bits.
    chosen = whole.reshape(-1, 1).view(torch.uint8)[positions].cpu()
    values = chosen.view(whole.dtype).flatten()
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
