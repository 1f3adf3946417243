"""The roofline: the least time that an adapter adds to a training step on a machine.

Each product and each pass over memory of a method takes at least

    max(multiply-adds / the rate of such a product, bytes / the rate of copying)

and one follows the other. The rates are measured in the same run. For T tokens through a layer of
in -> out with shard size r, in values of b bytes:

    Bone, once for each input             multiply-adds   bytes / b
      S = S(x)                                            T in + T r            read x
      dX += dS                                            2 T in + T r          read and write dX
    Bone, for each layer
      y += S D                            T r out         2 T out + T r + r out read and write y
      dS = dY D^T                         T r out         T out + T r + r out   read dY
      dD = S^T dY                         T r out         T out + T r + r out   read dY
    BAT, for each layer
      W + W D, in forward and backward    2 r in out      4 in out + 2 r out    read W, write W_eff
      G = dY^T X                          T in out        T in + T out + in out write G
      dD_a = sum over b of W_ab^T G_ab    r in out        2 in out + r out      read W and G
           + sum over b of G_ab                           in out + r out        read G

The base reads x and dY, and writes y and dX, in products of torch's own, which return no sums of
their operands. So x and dY are read again, and y and dX are read and written again. Layers that
read the same x (q, k and v) share S(x). BAT keeps no W_eff from forward to backward. Calls,
allocation and scales are not counted. The floor of a step is 1 + this time / that of the frozen
step. A forward of few tokens reads W and the adapter once, so its floor is
1 + bytes of the adapter / bytes of W.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.protocol import Budget, Run, compare
from benchmarks.timers import timer_of

CACHED_BYTES = 2**25
"""Most bytes of a pass that are counted as cached. Few processors have more cache for a process."""
CACHED_COPY, MEMORY_COPY = 2**21, 2**27
"""Bytes to copy. The first number fits in the cache of any processor, the second in none."""
CACHED_COPIES = 16
"""Copies of the smaller in a run. Only the first finds it in memory."""
BUDGET = Budget(4.0, least_rounds=7, most_rounds=40)


class Linear(NamedTuple):
    """The sizes of a linear layer."""

    in_features: int
    out_features: int

    def block(self, method: str, r: int) -> int:
        """Return the number of values in the block of a method, "bone" or "bat"."""
        return ceil(self.out_features / r) * r * r if method == "bat" else r * self.out_features


DECODER_LAYERS = 30
SMOLLM2_INPUTS = [576, 576, 576, 1536] * DECODER_LAYERS
"""The widths of the distinct inputs: q, k and v share one, gate and up another."""
SMOLLM2_LINEARS = [
    Linear(*sizes)
    for sizes in (
        *((576, 576), (576, 192), (576, 192), (576, 576)),
        *((576, 1536), (576, 1536), (1536, 576)),
    )
] * DECODER_LAYERS
"""The seven projections of every layer of SmolLM2-135M."""


class Term(NamedTuple):
    """A product, or a pass over memory: bytes, multiply-adds, and the product's name in rates."""

    bytes: float
    macs: float = 0
    product: str | None = None


class Rates(NamedTuple):
    """What a machine reaches: multiply-adds per second of each product, and bytes per second."""

    products: Mapping[str, float]
    cached: float
    memory: float

    def seconds(self, terms: Iterable[Term]) -> float:
        """Return the least time of terms that follow each other."""
        return sum(max(self._copied(term), self._computed(term)) for term in terms)

    def _copied(self, term: Term) -> float:
        return term.bytes / (self.cached if term.bytes <= CACHED_BYTES else self.memory)

    def _computed(self, term: Term) -> float:
        return 0.0 if term.product is None else term.macs / self.products[term.product]


def floor(table: str, case: Mapping[str, Any], method: str) -> float:
    """Return the least time of a method / that of the frozen base."""
    r, tokens = case["r"], case["tokens"]
    if table == "few_tokens":
        layer = Linear(case["width"], case.get("outputs", case["width"]))
        return 1 + layer.block(method, r) / (layer.in_features * layer.out_features)
    copying = case["rates"]["cached"], case["rates"]["memory"]
    rates = {
        Linear(one["in"], one["out"]): Rates(one["products"], *copying)
        for one in case["rates"]["layers"]
    }
    itemsize = getattr(torch, case["dtype"]).itemsize
    if table == "model_step":
        inputs, layers = SMOLLM2_INPUTS, SMOLLM2_LINEARS
    else:
        inputs, layers = [case["width"]], list(rates)
    of_passes, sizes = next(iter(rates.values())), (tokens, method, r, itemsize)
    added = sum(of_passes.seconds(_input_terms(width, *sizes)) for width in inputs)
    added += sum(rates[layer].seconds(_layer_terms(layer, *sizes)) for layer in layers)
    return 1 + added / min(case["seconds"]["frozen"])


def _input_terms(width: int, tokens: int, method: str, r: int, itemsize: int) -> list[Term]:
    x, sums = tokens * width * itemsize, tokens * r * itemsize
    return [Term(x + sums), Term(2 * x + sums)] if method == "bone" else []


def _layer_terms(layer: Linear, tokens: int, method: str, r: int, itemsize: int) -> list[Term]:
    values = layer.in_features * layer.out_features
    x, y = tokens * layer.in_features * itemsize, tokens * layer.out_features * itemsize
    sums, weight = tokens * r * itemsize, values * itemsize
    block, narrow = layer.block(method, r) * itemsize, tokens * r * layer.out_features
    if method == "bone":
        return [
            Term(2 * y + sums + block, narrow, "S D"),
            Term(y + sums + block, narrow, "dY D^T"),
            Term(y + sums + block, narrow, "S^T dY"),
        ]
    formed = Term(2 * weight + block, r * values, "W D")
    return [
        formed,
        formed,
        Term(x + y + weight, tokens * values, "dY^T X"),
        Term(2 * weight + block, r * values, "W^T G"),
        Term(weight + block),
    ]


def measured_rates(
    layers: Iterable[Linear],
    tokens: int,
    r: int,
    dtype: torch.dtype,
    device: torch.device,
    budget: Budget | None = None,
) -> dict[str, Any]:
    """Return what the machine reaches, as JSON.

    All products of a case are timed in rounds, in random order. Results go into memory that is
    there already. The best round counts, since the rates are for a floor.
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
    # To begin with a queue, an accelerator takes longer than many products.
    timer = timer_of(device, times=1 if device.type == "cpu" else 10)
    taken = compare(runs, BUDGET if budget is None else budget, timer)
    fastest = {name: min(seconds) for name, seconds in taken.items()}
    found: dict[str, Any] = {
        name: 2 * size * times / fastest[f"{name} copy"] for name, (size, times) in copies.items()
    }
    # On a GPU, to begin with a small copy may take longer than the copy.
    found["cached"] = max(found.values())
    found["layers"] = [
        {
            "in": layer.in_features,
            "out": layer.out_features,
            "products": {
                name: macs / min(fastest[key] for key in keys)
                for name, (macs, keys) in of_layer.items()
            },
        }
        for layer, of_layer in products.items()
    ]
    return found


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
    inputs, outputs = (-(-size // r) * r for size in layer)

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    x, y, weight = new(tokens, inputs), new(tokens, outputs), new(outputs, inputs)
    block, sums = new(r, outputs), new(tokens, r)
    tiles, blocks = weight.view(outputs // r, inputs, r), new(outputs // r, r, r)
    to_y, to_weight, to_block, to_sums = map(torch.empty_like, (y, weight, block, sums))
    to_tiles, to_blocks = to_weight.view(tiles.shape), torch.empty_like(blocks)
    base, narrow = tokens * inputs * outputs, tokens * r * outputs
    columns = sums.T.contiguous().T  # small products depend on the order of their operands
    yield "S D", narrow, partial(torch.mm, sums, block, out=to_y)
    yield "dY D^T", narrow, partial(torch.mm, y, block.T, out=to_sums)
    yield "S^T dY", narrow, partial(torch.mm, sums.T, y, out=to_block)
    yield "S^T dY", narrow, partial(torch.mm, columns.T, y, out=to_block)
    yield "S^T dY", narrow, partial(torch.mm, y.T, sums, out=new(outputs, r))
    yield "W D", r * inputs * outputs, partial(torch.bmm, tiles, blocks, out=to_tiles)
    yield "dY^T X", base, partial(torch.mm, y.T, x, out=to_weight)
    yield "W^T G", r * inputs * outputs, partial(torch.bmm, tiles.mT, to_tiles, out=to_blocks)
