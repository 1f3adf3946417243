"""What the machine can do: how fast a large product is, and a copy. The cost model rests on it."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.protocol import Budget, Spread, compare, synchroniser
from benchmarks.settings import Profile

__all__ = ["rates"]

COPIED_BYTES = 2**27
"""More than caches hold."""


def rates(profile: Profile, device: torch.device) -> list[dict[str, Any]]:
    """Measure multiply-adds per second of a square product, and bytes per second of a copy.

    The bytes count as read and as written.
    """
    cases = []
    for dtype in (torch.float32, torch.bfloat16):
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
