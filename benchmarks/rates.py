"""What the machine can do: how fast a large product is, and a copy. The cost model rests on it.

Not every processor computes in every dtype. Where it has no instructions for one, its products take
many times as long, the frozen base's too, and tell nothing about an adapter.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from benchmarks.protocol import Budget, Spread, compare, synchroniser
from benchmarks.settings import Profile

__all__ = ["rates", "without_instructions"]

COPIED_BYTES = 2**27
"""More than caches hold."""
TRIED_WIDTH = 512
FAR_SLOWER = 10.0
"""Than float32: converting to that and back costs a few times as much, no more."""


def without_instructions(
    dtypes: Collection[torch.dtype], device: torch.device
) -> dict[torch.dtype, float]:
    """Return the dtypes that the device has no instructions for.

    Args:
        dtypes: which to try, each with one small product.
        device: where.

    Returns:
        dtype -> how many times as long as in float32 a product takes.
    """
    square = torch.randn(TRIED_WIDTH, TRIED_WIDTH, device=device)
    operands = {dtype: square.to(dtype) for dtype in (torch.float32, *dtypes)}
    products = {str(dtype): lambda one=one: one @ one for dtype, one in operands.items()}
    budget = Budget(0.0, least_rounds=3, warm_up=1)
    seconds = compare(products, budget, synchronise=synchroniser(device))
    fastest = {dtype: min(seconds[str(dtype)]) for dtype in operands}
    ratios = {dtype: taken / fastest[torch.float32] for dtype, taken in fastest.items()}
    return {dtype: ratio for dtype, ratio in ratios.items() if ratio > FAR_SLOWER}


def rates(profile: Profile, device: torch.device) -> list[dict[str, Any]]:
    """Measure multiply-adds per second of a square product, and bytes per second of a copy.

    The bytes count as read and as written.
    """
    cases = []
    for dtype in profile.dtypes:
        width = profile.product_width
        a, b = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
        source = torch.zeros(COPIED_BYTES // dtype.itemsize, device=device, dtype=dtype)
        target = torch.zeros_like(source)
        runs = {
            "product": lambda a=a, b=b: a @ b,
            "copy": lambda source=source, target=target: target.copy_(source),
        }
        budget = Budget(3.0, least_rounds=5, most_rounds=20)
        seconds = compare(runs, budget, synchronise=synchroniser(device))
        cases.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "width": width,
                "macs_per_second": width**3 / Spread.of(seconds["product"]).median,
                "bytes_per_second": 2 * COPIED_BYTES / Spread.of(seconds["copy"]).median,
                "seconds": seconds,
                "left_out": {},
            }
        )
    return cases
