"""Fingerprints: a few digits that tell one base weight from another."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from disha.functional.shard_sums import is_inexact
from disha.private_torch import FakeTensor
from disha.sharding.tensors import gather

SAMPLES = 64
HALF = 8  # digits of each of the two digests

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a value -> the integers of that size from which torch can `take`."""


def sample(values: Tensor) -> Tensor:
    """Return 64 values of a tensor, from the first to the last, or all if there are fewer."""
    if values.numel() <= SAMPLES:
        return values.flatten().clone()
    last = values.numel() - 1
    numbers = torch.arange(SAMPLES, device=values.device)
    positions = numbers * last // (SAMPLES - 1)  # from 0 to `last`, in even steps
    if values.is_complex():
        return values.take(positions)
    # torch can't `take` from float8, nor from unsigned integers of more than 8 bits. So the values
    # are taken as integers that have the same bits.
    as_integers = values.view(_INTEGERS[values.itemsize])
    return as_integers.take(positions).view(values.dtype)


def fingerprint(weight: Tensor) -> str | None:
    """Return 16 hexadecimal digits of 64 of a weight's values, or None; collective if sharded.

    The same base may be stored in float32, bfloat16 or float16. So there are two digests: of the
    values rounded to bfloat16, and of those rounded to float16 and then to bfloat16.
    """
    has_values = not (weight.is_meta or isinstance(weight, FakeTensor))
    if not has_values or not is_inexact(weight) or not weight.numel():
        return None
    chosen = sample(gather(weight.detach())).cpu()
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
    # The dtype in which both were rounded alike gives an equal digest.
    halves = {first[:HALF], first[HALF:]}
    return not halves.isdisjoint({second[:HALF], second[HALF:]})
