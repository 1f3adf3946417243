"""The rates of a machine: of each product of a layer and its adapters, and of copying.

All products of a case are timed in rounds, in random order, as candidates are. Results go into
memory that is there already, so no allocation is timed. The best round counts, since the rates are
for a floor. The operands are of the sizes of the case, padded to whole shards.

Small products depend on the order in memory of their operands. Where it matters, the better of two
counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cost_model import Linear
from benchmarks.protocol import Budget, Run, compare, synchroniser
from disha.functional.shards import shard_sum

__all__ = ["bone_pieces", "measured_rates"]

CACHED_COPY, MEMORY_COPY = 2**21, 2**27
"""Bytes to copy. The first number fits in the cache of any processor, the second in none."""

CACHED_COPIES = 16
"""Copies of the smaller in a run. Only the first finds it in memory."""


def measured_rates(
    layers: Iterable[Linear],
    tokens: int,
    r: int,
    dtype: torch.dtype,
    device: torch.device,
    budget: Budget,
) -> dict[str, Any]:
    """Return what the machine reaches, as JSON.

    Args:
        layers: sizes; equal ones are measured once.
        tokens: rows of the input.
        r: the shard size.
        dtype: of all operands.
        device: where.
        budget: of all measurements together.

    Returns:
        "cached" and "memory", bytes per second of copying, and "layers": the sizes "in" and "out",
        and "products", name -> multiply-adds per second.
    """
    runs: dict[str, Run] = {}
    products: dict[Linear, dict[str, tuple[float, list[str]]]] = {}
    for layer in dict.fromkeys(layers):
        of_layer = products[layer] = {}
        for name, macs, run in _products(layer, tokens, r, dtype, device):
            key = f"product {len(runs)}"
            of_layer.setdefault(name, (macs, []))[1].append(key)
            runs[key] = run
    copies = {"cached": (CACHED_COPY, CACHED_COPIES), "memory": (MEMORY_COPY, 1)}
    for name, (size, times) in copies.items():
        runs[f"{name} copy"] = _copier(size, times, device)
    fastest = {
        name: min(taken)
        for name, taken in compare(runs, budget, synchronise=synchroniser(device)).items()
    }

    return {
        **{
            name: 2 * size * times / fastest[f"{name} copy"]
            for name, (size, times) in copies.items()
        },
        "layers": [
            {
                "in": layer.in_features,
                "out": layer.out_features,
                "products": {
                    name: macs / min(fastest[key] for key in keys)
                    for name, (macs, keys) in of_layer.items()
                },
            }
            for layer, of_layer in products.items()
        ],
    }


def _copier(size: int, times: int, device: torch.device) -> Run:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def run() -> None:
        for _ in range(times):
            target.copy_(source)

    return run


def _products(
    layer: Linear, tokens: int, r: int, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, float, Run]]:
    """Yield the name of each product, its multiply-adds, and a call that computes it."""
    inputs, outputs = (-(-size // r) * r for size in (layer.in_features, layer.out_features))

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    x, y, weight, block, sums = (
        new(tokens, inputs), new(tokens, outputs), new(outputs, inputs), new(r, outputs),
        new(tokens, r),
    )  # fmt: skip
    tiles, blocks = weight.view(outputs // r, inputs, r), new(outputs // r, r, r)
    to_x, to_y, to_weight, to_block, to_sums = map(torch.empty_like, (x, y, weight, block, sums))
    to_tiles, to_blocks = to_weight.view(tiles.shape), torch.empty_like(blocks)
    base, narrow = tokens * inputs * outputs, tokens * r * outputs
    columns = sums.T.contiguous().T
    yield "x W^T", base, partial(torch.mm, x, weight.T, out=to_y)
    yield "dY W", base, partial(torch.mm, y, weight, out=to_x)
    yield "S D", narrow, partial(torch.mm, sums, block, out=to_y)
    yield "dY D^T", narrow, partial(torch.mm, y, block.T, out=to_sums)
    yield "S^T dY", narrow, partial(torch.mm, sums.T, y, out=to_block)
    yield "S^T dY", narrow, partial(torch.mm, columns.T, y, out=to_block)
    yield "S^T dY", narrow, partial(torch.mm, y.T, sums, out=new(outputs, r))
    yield "W D", r * inputs * outputs, partial(torch.bmm, tiles, blocks, out=to_tiles)
    yield "dY^T X", base, partial(torch.mm, y.T, x, out=to_weight)
    yield "W^T G", r * inputs * outputs, partial(torch.bmm, tiles.mT, to_tiles, out=to_blocks)


def bone_pieces(
    width: int, tokens: int, r: int, dtype: torch.dtype, device: torch.device, budget: Budget
) -> dict[str, list[float]]:
    """Time what Bone adds to a step of a square layer, piece by piece.

    Args:
        width: of the layer; a multiple of r.
        tokens: rows of the input.
        r: the shard size.
        dtype: of all operands.
        device: where.
        budget: of all pieces together.

    Returns:
        Name of a term of the roofline -> seconds in each round.
    """

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    x, y, block, sums = new(tokens, width), new(tokens, width), new(r, width), new(tokens, r)
    shards = new(tokens, width).view(tokens, width // r, r)
    runs: dict[str, Run] = {
        "S(x)": partial(shard_sum, x, r),
        "y += S D": partial(new(tokens, width).addmm_, sums, block),
        "dS = dY D^T": partial(torch.mm, y, block.T),
        "dD = S^T dY": partial(torch.mm, sums.T, y),
        "dX += dS": lambda: shards.add_(sums.unsqueeze(1)),
    }
    return compare(runs, budget, synchronise=synchroniser(device))
