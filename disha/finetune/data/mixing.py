"""Several data sets with weights, mixed into one order of rows.

With the weights w, a data set gives the part w / (w1 + w2 + ...) of an epoch's rows. An epoch has
as many rows as the data sets with a weight above 0 have together. Every epoch draws anew: a data
set that has more rows than that gives a random part of them, and one that has fewer is repeated, in
another order each time.
"""

from __future__ import annotations

import random
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, count

from disha.finetune.data.order import permutation

__all__ = ["drawn", "mixed_order"]


def drawn(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Return how many rows an epoch draws from each data set.

    Args:
        sizes: how many rows each has. One without rows counts as if its weight were 0.
        weights: their weights, at least 0.
    """
    shares = [weight if size else 0.0 for size, weight in zip(sizes, weights, strict=True)]
    total = sum(size for size, share in zip(sizes, shares, strict=True) if share)
    return [max(1, round(total * (share / sum(shares)))) if share else 0 for share in shares]


def mixed_order(
    sizes: Sequence[int],
    weights: Sequence[float],
    seed: int,
    order_of: Callable[[int, int], Sequence[int]],
) -> array[int]:
    """Return the numbers of the rows that an epoch draws, counted through all data sets.

    Args:
        sizes: how many rows each data set has.
        weights: their weights.
        seed: decides which rows are drawn, and their order.
        order_of: returns the rows of a data set in the order that a seed decides; takes the number
            of the data set and the seed.
    """
    ends = list(accumulate(drawn(sizes, weights)))
    starts = accumulate(sizes[:-1], initial=0)
    streams = [_endless(start, place, seed, order_of) for place, start in enumerate(starts)]
    chosen = permutation(ends[-1], seed)
    return array("q", (next(streams[bisect_right(ends, index)]) for index in chosen))


def _endless(
    start: int, place: int, seed: int, order_of: Callable[[int, int], Sequence[int]]
) -> Iterator[int]:
    """Yield the rows of a data set again and again, each time in another order."""
    for turn in count():
        own_seed = random.Random(f"{seed} {place} {turn}").getrandbits(62)
        yield from (start + index for index in order_of(place, own_seed))
