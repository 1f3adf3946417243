"""The order of rows, set by a seed; with weights, of several data sets mixed into one.

A data set with the weight w gives the part w / (w1 + w2 + ...) of an epoch's rows. An epoch has as
many rows as the data sets with a weight above 0 have together. Every epoch draws anew. If a data
set has more rows than it gives, each epoch draws another random part of them. If it has fewer, its
rows are repeated, in another order each time.
"""

from __future__ import annotations

import random
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, count

import torch

__all__ = ["drawn", "mixed_order", "permutation"]

CHUNK = 65536
"""How many numbers are Python objects at a time. They take more memory than numbers in an array."""


def permutation(count: int, seed: int) -> array[int]:
    """Return the numbers below `count` in a random order, set by `seed`; 8 bytes each."""
    generator = torch.Generator().manual_seed(seed)
    order = array("q")
    for chunk in torch.split(torch.randperm(count, generator=generator), CHUNK):
        order.extend(chunk.tolist())
    return order


def drawn(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Return how many rows an epoch draws from each data set.

    Args:
        sizes: how many rows each has. One without rows counts as if its weight were 0.
        weights: their weights, at least 0.
    """
    shares = [weight if size else 0.0 for size, weight in zip(sizes, weights, strict=True)]
    total = sum(size for size, share in zip(sizes, shares, strict=True) if share)
    return [max(1, round(total * (share / sum(shares)))) if share else 0 for share in shares]


def mixed_order(sizes: Sequence[int], weights: Sequence[float], seed: int) -> array[int]:
    """Return the numbers of the rows that an epoch draws. They count through all data sets.

    Args:
        sizes: how many rows each data set has.
        weights: their weights.
        seed: decides which rows are drawn, and their order.
    """
    ends = list(accumulate(drawn(sizes, weights)))
    starts = accumulate(sizes[:-1], initial=0)
    streams = [
        _endless(start, size, f"{seed} {place}")
        for place, (start, size) in enumerate(zip(starts, sizes, strict=True))
    ]
    chosen = permutation(ends[-1], seed)
    return array("q", (next(streams[bisect_right(ends, index)]) for index in chosen))


def _endless(start: int, size: int, seed: str) -> Iterator[int]:
    """Yield the rows of a data set again and again, each time in another order."""
    for turn in count():
        own_seed = random.Random(f"{seed} {turn}").getrandbits(62)
        yield from (start + index for index in permutation(size, own_seed))
