"""What the methods cost on paper: multiply-adds and bytes kept, from sizes alone.

For T tokens through a layer of in -> out with shard size r, in multiply-adds:

    frozen  forward: T in out          backward: T in out (the gradient of the input)
    Bone    + T r out (S D)            + 2 T r out (dS, dD)
    LoRA    + T p (in + out)           + 2 T p (in + out), for rank p
    BAT     + r in out (W + dW)        + 2 r in out + T in out (W + dW; dD; G = dY^T X)

So a training step of Bone costs 1 + 3 r / (2 in) times the frozen layer's. LoRA with as many
parameters, p (in + out) = r out, costs the same. BAT costs 1.5 (1 + r / T). For T < r tokens
without gradients, BAT does not form W + dW and needs T in out more. Sums over shards and scalings
are not counted: these are floors, for products alone.

Kept for backward, beyond the frozen layer's own: S for Bone, the input for BAT, the input and its
projection for LoRA.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

__all__ = [
    "METHODS",
    "MODELS",
    "SMOLLM2_135M",
    "Decoder",
    "Linear",
    "Prediction",
    "adapter_parameters",
    "decoder_step_floor",
    "forward_floor",
    "forward_macs",
    "kept_bytes",
    "lora_rank",
    "predict",
    "step_floor",
    "step_macs",
]

METHODS = ("frozen", "bone", "bat", "lora")


@dataclass(frozen=True)
class Linear:
    """The sizes of a linear layer."""

    in_features: int
    out_features: int

    @property
    def values(self) -> int:
        """The number of values in its weight."""
        return self.in_features * self.out_features


def lora_rank(layers: Iterable[Linear], r: int) -> float:
    """Return the rank at which LoRA has as many parameters as Bone; it may be fractional.

    Args:
        layers: all adapted layers, which get the same rank.
        r: Bone's shard size.
    """
    layers = list(layers)
    ends = sum(layer.in_features + layer.out_features for layer in layers)
    return sum(r * layer.out_features for layer in layers) / ends


def adapter_parameters(layer: Linear, method: str, r: int, rank: float | None = None) -> float:
    """Return how many values of a layer train.

    Args:
        layer: its sizes.
        method: one of METHODS.
        r: shard size of Bone and BAT.
        rank: LoRA's; by default the one with as many parameters as Bone in this layer.
    """
    if method == "frozen":
        return 0
    if method == "lora":
        rank = lora_rank([layer], r) if rank is None else rank
        return rank * (layer.in_features + layer.out_features)
    if method == "bat":
        return ceil(layer.out_features / r) * r * r
    return r * layer.out_features


def forward_macs(
    layer: Linear, tokens: int, method: str, r: int, rank: float | None = None
) -> float:
    """Return the multiply-adds of a forward without gradients.

    Args:
        layer: its sizes.
        tokens: rows of the input.
        method: one of METHODS.
        r: shard size of Bone and BAT.
        rank: LoRA's; by default the one with as many parameters as Bone in this layer.
    """
    base = tokens * layer.values
    if method == "bat":
        return base + min(tokens, r) * layer.values
    return base + tokens * adapter_parameters(layer, method, r, rank)


def step_macs(layer: Linear, tokens: int, method: str, r: int, rank: float | None = None) -> float:
    """Return the multiply-adds of forward and backward, with the gradient of the input.

    Args:
        layer: its sizes.
        tokens: rows of the input.
        method: one of METHODS.
        r: shard size of Bone and BAT.
        rank: LoRA's; by default the one with as many parameters as Bone in this layer.
    """
    base = 2 * tokens * layer.values
    if method == "bat":
        return base + (tokens + 3 * r) * layer.values
    return base + 3 * tokens * adapter_parameters(layer, method, r, rank)


def forward_floor(layer: Linear, tokens: int, method: str, r: int) -> float:
    """Return multiply-adds of a forward / those of the frozen layer."""
    return forward_macs(layer, tokens, method, r) / forward_macs(layer, tokens, "frozen", r)


def step_floor(layer: Linear, tokens: int, method: str, r: int) -> float:
    """Return multiply-adds of a training step / those of the frozen layer."""
    return step_macs(layer, tokens, method, r) / step_macs(layer, tokens, "frozen", r)


def kept_bytes(
    layer: Linear, tokens: int, method: str, r: int, itemsize: int, rank: float | None = None
) -> float:
    """Return the bytes kept from forward to backward, beyond the frozen layer's own.

    The input counts here even if another layer keeps it too, such as an activation that keeps its
    output, or a second projection of the same input.

    Args:
        layer: its sizes.
        tokens: rows of the input.
        method: one of METHODS.
        r: shard size of Bone and BAT.
        itemsize: bytes of one value.
        rank: LoRA's; by default the one with as many parameters as Bone in this layer.
    """
    if method == "bone":
        return tokens * r * itemsize
    if method == "bat":
        return tokens * layer.in_features * itemsize
    if method == "lora":
        rank = lora_rank([layer], r) if rank is None else rank
        return tokens * (layer.in_features + rank) * itemsize
    return 0


@dataclass(frozen=True)
class Decoder:
    """The sizes of a Llama-family decoder.

    Args:
        name: of the model.
        hidden: width of the residual stream.
        feed_forward: width inside the feed-forward layers.
        layers: number of decoder layers.
        queries: width of all query heads together.
        keys: width of all key heads together, and of all value heads.
        vocabulary: number of tokens.
        tied_head: whether the head is the embedding.
    """

    name: str
    hidden: int
    feed_forward: int
    layers: int
    queries: int
    keys: int
    vocabulary: int
    tied_head: bool = False

    @property
    def linears(self) -> list[Linear]:
        """The seven projections of every layer, which are adapted."""
        h, f, q, k = self.hidden, self.feed_forward, self.queries, self.keys
        sizes = [(h, q), (h, k), (h, k), (q, h), (h, f), (h, f), (f, h)]
        return [Linear(*size) for size in sizes] * self.layers

    @property
    def inputs(self) -> list[int]:
        """The widths of their distinct inputs: q, k and v share one, gate and up another."""
        return [self.hidden, self.queries, self.hidden, self.feed_forward] * self.layers

    @property
    def weights(self) -> int:
        """The number of values in the projections, the embedding and the head."""
        ends = (1 if self.tied_head else 2) * self.hidden * self.vocabulary
        return sum(layer.values for layer in self.linears) + ends


SMOLLM2_135M = Decoder("SmolLM2-135M", 576, 1536, 30, 576, 192, 49152, tied_head=True)
MODELS = (
    Decoder("7B", 4096, 11008, 32, 4096, 4096, 32000),
    Decoder("70B", 8192, 28672, 80, 8192, 1024, 32000),
)
"""With the sizes of Llama 2."""


def decoder_step_floor(
    model: Decoder, batch: int, length: int, method: str, r: int, rank: float | None = None
) -> float:
    """Return multiply-adds of a whole model's training step / those of the frozen model.

    All products count: the projections, the head and causal attention.

    Args:
        model: its sizes.
        batch: number of sequences.
        length: tokens in each.
        method: one of METHODS.
        r: shard size.
        rank: LoRA's, one for all layers; by default the one with as many parameters as Bone.
    """
    rank = lora_rank(model.linears, r) if rank is None else rank
    tokens = batch * length
    head = 2 * tokens * model.hidden * model.vocabulary
    # Two products in forward, four in backward; the mask halves each.
    attention = 6 * tokens * length * model.queries * model.layers / 2
    frozen, adapted = (
        sum(step_macs(layer, tokens, one, r, rank) for layer in model.linears) + head + attention
        for one in ("frozen", method)
    )
    return adapted / frozen


@dataclass(frozen=True)
class Prediction:
    """What an adapter of a whole model adds to a training step on one device.

    Attributes:
        trainable: adapter parameters.
        state_bytes: 16-bit values and gradients, float32 master values and two moments.
        kept_bytes: kept for backward by the adapters alone; an input of several layers counts once.
        step_ratio: multiply-adds / those of the frozen model.
    """

    trainable: float
    state_bytes: float
    kept_bytes: float
    step_ratio: float


def predict(model: Decoder, method: str, *, r: int, batch: int, length: int) -> Prediction:
    """Return what an adapter costs on paper, in 16 bits.

    Args:
        model: its sizes.
        method: one of METHODS.
        r: shard size.
        batch: number of sequences.
        length: tokens in each.
    """
    tokens, itemsize, layers = batch * length, 2, model.linears
    rank = lora_rank(layers, r)
    trainable = sum(adapter_parameters(layer, method, r, rank) for layer in layers)
    own = {"bone": r, "lora": rank}.get(method, 0) * len(layers)
    inputs = sum(model.inputs) if method in ("bat", "lora") else 0
    return Prediction(
        trainable=trainable,
        state_bytes=trainable * (2 + 2 + 4 + 4 + 4),
        kept_bytes=tokens * itemsize * (own + inputs),
        step_ratio=decoder_step_floor(model, batch, length, method, r, rank),
    )
