"""Fingerprints, which tell one base weight from another; checksums, which tell if one changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from disha.functional.shard_sums import as_real, is_inexact
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


def _can_be_read(values: Tensor) -> bool:
    return not values.is_meta and not isinstance(values, FakeTensor) and values.numel() > 0


def fingerprint(weight: Tensor) -> str | None:
    """Return 16 hexadecimal digits of 64 of a weight's values, or None; collective if sharded.

    The same base may be stored in float32, bfloat16 or float16. So there are two digests: of the
    values rounded to bfloat16, and of those rounded to float16 and then to bfloat16.
    """
    if not _can_be_read(weight) or not is_inexact(weight):
        return None
    chosen = as_real(sample(gather(weight.detach())).cpu()).flatten()
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


CHUNK = 2**18  # the values that are added up at a time

Checksums = Mapping[torch.dtype, int]
"""The dtype of a weight, first, and dtypes to which it may be cast -> the checksum when cast so."""


def checksums(values: Tensor) -> Checksums:
    """Return the checksums of all values of a weight or buffer; none if it has no values."""
    if not _can_be_read(values):
        return {}
    values = as_real(values.detach())
    casts = (torch.float32, torch.bfloat16, torch.float16) if is_inexact(values) else ()
    dtypes = dict.fromkeys((values.dtype, *casts))
    return {dtype: _checksum(values, dtype, values.dtype) for dtype in dtypes}


def has_changed(values: Tensor, written: Checksums) -> bool:
    """Whether any value has changed since the checksums were made. A cast of all is no change."""
    if not written or not _can_be_read(values):
        return False
    own, *_ = written
    return _checksum(as_real(values.detach()), own, own) not in written.values()


def _checksum(values: Tensor, cast: torch.dtype, own: torch.dtype) -> int:
    """Return the sum of the bits of all values, eight bytes at a time, each times an odd number.

    The values are those after a cast, in the dtype `own`. An odd number loses no bit.
    """
    odd_numbers = torch.arange(1, 2 * CHUNK, 2, device=values.device)
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for chunk in torch.split(values.flatten(), CHUNK):
        cast_chunk = chunk.to(cast).to(own)
        missing = -cast_chunk.nbytes % 8 // cast_chunk.itemsize
        # A copy begins at a multiple of eight bytes.
        aligned = torch.cat([cast_chunk, cast_chunk.new_zeros(missing)])
        bits = aligned.view(torch.int64)
        total = total * 31 + (bits * odd_numbers[: len(bits)]).sum()
    return int(total)
