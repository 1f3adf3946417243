"""The roofline floor: the least time that an adapter adds to a training step on a machine.

Each product and each pass over memory of a method takes at least

    max(multiply-adds / the rate of such a product, bytes / the rate of copying)

and one follows the other. The rates are measured (`benchmarks.rates`). For T tokens through a layer
of in -> out with shard size r, in values of b bytes:

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
    Bone, formed, once for each input, and then for each layer
      S = S(x)                                            T in + T r
      W + dW, in forward and backward                     4 in out + 2 r out    read W, write W_eff
      dD = S^T dY                         T r out         T out + T r + r out

Why each is unavoidable:

- The base reads x and dY, and writes y and dX. Its products are torch's own. They return no sums of
  their operands and call nothing on a tile of their result, so x and dY are read again, and y and
  dX are read and written again. A pass that touches at most CACHED_BYTES is counted at the rate of
  copying within a cache, as if it found everything there.
- An update is added in place, by the product itself where there is one.
- Layers that read the same x (q, k and v) share S(x), and one pass adds the sum of their dS to dX.
- BAT keeps no W_eff from forward to backward, so it forms it twice.
- *Formed* means that Bone adds dW to the weight, as BAT does. That needs one product in place of
  three, and pays off for many tokens. In 16 bits, W + dW would round small updates away. So it is
  counted for float32 alone, and apart from Bone.

Not counted: calls, allocation, scales, data that is no longer in a cache, and the second way by
which BAT adds D in 16 bits. The floor of a step is 1 + this time / the time of the frozen step.

A forward of few tokens reads W once, and the adapter once. Products are faster than that. So its
floor is 1 + bytes of the adapter / bytes of W, without any rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.cost_model import Decoder, Linear, adapter_parameters

__all__ = [
    "CACHED_BYTES",
    "FORMED",
    "METHODS",
    "Rates",
    "Term",
    "decoder_seconds",
    "few_tokens_floor",
    "input_terms",
    "layer_seconds",
    "layer_terms",
    "read_rates",
    "seconds",
]

CACHED_BYTES = 2**25
"""Most bytes of a pass that are counted as cached. Few processors have more cache for a process."""

METHODS = ("frozen", "bone", "bat")
FORMED = "bone, formed"
"""Bone with dW added to the weight, as a method of the roofline."""


class Term(NamedTuple):
    """A product, or a pass over memory.

    Attributes:
        name: what it computes.
        bytes: read and written.
        macs: multiply-adds.
        product: the name of the product in the rates; None if there is none.
    """

    name: str
    bytes: float
    macs: float = 0
    product: str | None = None


@dataclass(frozen=True)
class Rates:
    """What a machine reaches.

    Args:
        products: name of a product -> multiply-adds per second, for one layer's sizes.
        cached: bytes per second of copying within a cache, read and written bytes together.
        memory: the same for more bytes than the caches hold.
    """

    products: Mapping[str, float]
    cached: float
    memory: float


def read_rates(found: Mapping[str, Any]) -> dict[Linear, Rates]:
    """Return the rates of each layer size, from the JSON of `benchmarks.rates`."""
    return {
        Linear(one["in"], one["out"]): Rates(one["products"], found["cached"], found["memory"])
        for one in found["layers"]
    }


def input_terms(width: int, tokens: int, method: str, r: int, itemsize: int) -> list[Term]:
    """Return what a method does once for each input, however many layers read it.

    Args:
        width: values of a token.
        tokens: how many.
        method: one of METHODS, or FORMED.
        r: the shard size.
        itemsize: bytes of a value.
    """
    x, sums = tokens * width * itemsize, tokens * r * itemsize
    shard_sum = Term("S(x)", x + sums)
    if method == "bone":
        return [shard_sum, Term("dX += dS", 2 * x + sums)]
    return [shard_sum] if method == FORMED else []


def layer_terms(layer: Linear, tokens: int, method: str, r: int, itemsize: int) -> list[Term]:
    """Return what a method does for each layer.

    Args:
        layer: its sizes.
        tokens: rows of its input.
        method: one of METHODS, or FORMED.
        r: the shard size.
        itemsize: bytes of a value.
    """
    x, y = tokens * layer.in_features * itemsize, tokens * layer.out_features * itemsize
    sums, weight = tokens * r * itemsize, layer.values * itemsize
    block = adapter_parameters(layer, "bat" if method == "bat" else "bone", r) * itemsize
    narrow, tiled = tokens * r * layer.out_features, r * layer.values
    gradient = Term("dD = S^T dY", y + sums + block, narrow, "S^T dY")
    if method == "bone":
        return [
            Term("y += S D", 2 * y + sums + block, narrow, "S D"),
            Term("dS = dY D^T", y + sums + block, narrow, "dY D^T"),
            gradient,
        ]
    if method == "bat":
        formed = Term("W + W D", 2 * weight + block, tiled, "W D")
        return [
            formed,
            formed,
            Term("G = dY^T X", x + y + weight, tokens * layer.values, "dY^T X"),
            Term("W^T G", 2 * weight + block, tiled, "W^T G"),
            Term("sum of G", weight + block),
        ]
    if method == FORMED:
        formed = Term("W + dW", 2 * weight + block)
        return [formed, formed, gradient]
    return []


def seconds(terms: Iterable[Term], rates: Rates) -> float:
    """Return the least time of terms that follow each other."""
    return sum(_seconds(term, rates) for term in terms)


def _seconds(term: Term, rates: Rates) -> float:
    copied = term.bytes / (rates.cached if term.bytes <= CACHED_BYTES else rates.memory)
    computed = 0.0 if term.product is None else term.macs / rates.products[term.product]
    return max(copied, computed)


def layer_seconds(
    layer: Linear, tokens: int, method: str, r: int, itemsize: int, rates: Rates
) -> float:
    """Return the least time that a method adds to a training step of one layer.

    Args:
        layer: its sizes.
        tokens: rows of its input.
        method: one of METHODS, or FORMED.
        r: the shard size.
        itemsize: bytes of a value.
        rates: of these sizes.
    """
    terms = [
        *input_terms(layer.in_features, tokens, method, r, itemsize),
        *layer_terms(layer, tokens, method, r, itemsize),
    ]
    return seconds(terms, rates)


def decoder_seconds(
    model: Decoder,
    tokens: int,
    method: str,
    r: int,
    itemsize: int,
    rates: Mapping[Linear, Rates],
) -> float:
    """Return the least time that a method adds to a training step of a whole model.

    The head and the attention are the base's, so they add nothing.

    Args:
        model: its sizes; all projections are adapted.
        tokens: of a batch.
        method: one of METHODS, or FORMED.
        r: the shard size.
        itemsize: bytes of a value.
        rates: of each size of a projection.
    """
    any_size = next(iter(rates.values()))  # passes need no product
    inputs = sum(
        seconds(input_terms(width, tokens, method, r, itemsize), any_size) for width in model.inputs
    )
    return inputs + sum(
        seconds(layer_terms(layer, tokens, method, r, itemsize), rates[layer])
        for layer in model.linears
    )


def few_tokens_floor(layer: Linear, method: str, r: int) -> float:
    """Return bytes of the weight and the adapter / bytes of the weight.

    Args:
        layer: its sizes.
        method: one of the cost model's.
        r: the shard size.
    """
    return 1 + adapter_parameters(layer, method, r) / layer.values
