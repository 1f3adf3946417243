"""What the methods cost on paper: multiply-adds, bytes moved, bytes kept, from sizes alone.

For T tokens through a layer of in -> out with shard size r, in multiply-adds (MACs):

    frozen  forward: T in out          backward: T in out (the gradient of the input)
    Bone    + T r out (S D)            + 2 T r out (dS, dD)
    LoRA    + T p (in + out)           + 2 T p (in + out), of rank p
    BAT     + r in out (W_eff)         + 2 r in out + T in out (W_eff; dD; G = dY^T X)

A training step of Bone is thus 1 + 3 r / (2 in) of the frozen layer's; LoRA's with as many
parameters, p (in + out) = r out, is the same; BAT's is 1.5 (1 + r / T). The forward of BAT for
T < r tokens streams: T in out more, W_eff never formed. Sums over shards and scalings are not
counted: they are floors, for products alone.

Bytes moved count each operand of an operation read once and each result written once, as if caches
held nothing from one to the next and everything within one. The roofline gives each operation the
longer of two times, for its multiply-adds and for its bytes, and adds them up.

Bytes kept are what backward needs beyond the frozen layer's own: S for Bone, the input for BAT, the
input and its projection for LoRA.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil

__all__ = [
    "HARDWARE",
    "METHODS",
    "MODELS",
    "SMOLLM2_135M",
    "Decoder",
    "Hardware",
    "Linear",
    "Operation",
    "Prediction",
    "adapter_parameters",
    "decoder_step_floor",
    "forward_floor",
    "forward_operations",
    "kept_bytes",
    "lora_rank",
    "macs",
    "moved_bytes",
    "predict",
    "roofline_seconds",
    "step_floor",
    "step_operations",
]

METHODS = ("frozen", "bone", "bat", "lora")


@dataclass(frozen=True)
class Linear:
    """A linear layer by its sizes."""

    in_features: int
    out_features: int

    @property
    def values(self) -> int:
        """The number of values in its weight."""
        return self.in_features * self.out_features


def lora_rank(layers: Iterable[Linear], r: int) -> float:
    """Return the rank, maybe not whole, at which LoRA has as many parameters as Bone.

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
        rank: LoRA's; by default that of as many parameters as Bone has in this layer.
    """
    if method == "frozen":
        return 0
    if method == "lora":
        rank = lora_rank([layer], r) if rank is None else rank
        return rank * (layer.in_features + layer.out_features)
    if method == "bat":
        return ceil(layer.out_features / r) * r * r
    return r * layer.out_features


@dataclass(frozen=True)
class Operation:
    """One product, or one pass over tensors.

    Attributes:
        macs: multiply-adds; 0 for a pass that only adds or copies.
        values: how many values it reads and writes, each operand once.
    """

    macs: float
    values: float


def _product(m: float, k: float, n: float, accumulate: bool = False) -> Operation:
    """(m, k) times (k, n) into a result, or added to one that is there."""
    return Operation(m * k * n, m * k + k * n + m * n * (2 if accumulate else 1))


def forward_operations(
    layer: Linear, tokens: int, method: str, r: int, rank: float | None = None
) -> list[Operation]:
    """Return what one forward consists of; of two ways the one with fewer multiply-adds.

    Args:
        layer: its sizes.
        tokens: rows of the input.
        method: one of METHODS.
        r: shard size of Bone and BAT.
        rank: LoRA's; by default that of as many parameters as Bone has in this layer.
    """
    width, out = layer.in_features, layer.out_features
    base = _product(tokens, width, out)
    if method == "bone":
        return [
            base,
            Operation(0, tokens * width + tokens * r),  # S
            _product(tokens, r, out, accumulate=True),
        ]
    if method == "lora":
        rank = lora_rank([layer], r) if rank is None else rank
        return [base, _product(tokens, width, rank), _product(tokens, rank, out, accumulate=True)]
    if method == "bat" and tokens < r:
        copies, blocks = out / r * tokens * width, out * r
        moved = Operation(r * copies, blocks + copies)  # u_ab = x_b + D_a x_b
        return [moved, Operation(base.macs, copies + layer.values + tokens * out)]
    if method == "bat":
        return [_effective_weight(layer, r), base]
    return [base]


def _effective_weight(layer: Linear, r: int) -> Operation:
    return Operation(r * layer.values, 2 * layer.values + r * layer.out_features)


def step_operations(
    layer: Linear, tokens: int, method: str, r: int, rank: float | None = None
) -> list[Operation]:
    """Return what forward and backward consist of, the gradient of the input included.

    Args:
        layer: its sizes.
        tokens: rows of the input.
        method: one of METHODS.
        r: shard size of Bone and BAT.
        rank: LoRA's; by default that of as many parameters as Bone has in this layer.
    """
    width, out = layer.in_features, layer.out_features
    if method == "bat":  # which forms W_eff here, however few the tokens are
        forward = [_effective_weight(layer, r), _product(tokens, width, out)]
    else:
        forward = forward_operations(layer, tokens, method, r, rank)
    to_input = _product(tokens, out, width)
    if method == "bone":
        return [
            *forward,
            to_input,
            _product(tokens, out, r),  # dS
            Operation(0, tokens * r + 2 * tokens * width),  # added to every shard of dX
            _product(r, tokens, out),  # dD
        ]
    if method == "lora":
        rank = lora_rank([layer], r) if rank is None else rank
        return [
            *forward,
            to_input,
            _product(tokens, out, rank),  # to the projection
            _product(out, tokens, rank),  # dB
            _product(tokens, rank, width, accumulate=True),
            _product(rank, tokens, width),  # dA
        ]
    if method == "bat":
        return [
            *forward,
            _effective_weight(layer, r),
            to_input,
            _product(out, tokens, width),  # G
            Operation(r * layer.values, 2 * layer.values + r * out),  # dD
        ]
    return [*forward, to_input]


def macs(operations: Iterable[Operation]) -> float:
    """Return their multiply-adds."""
    return sum(operation.macs for operation in operations)


def moved_bytes(operations: Iterable[Operation], itemsize: int) -> float:
    """Return the bytes that they read and write.

    Args:
        operations: of a forward or a step.
        itemsize: bytes of one value.
    """
    return itemsize * sum(operation.values for operation in operations)


def roofline_seconds(
    operations: Iterable[Operation], itemsize: int, macs_per_second: float, bandwidth: float
) -> float:
    """Return how long they take one after the other, each by what limits it.

    Args:
        operations: of a forward or a step.
        itemsize: bytes of one value.
        macs_per_second: multiply-adds per second of a large product.
        bandwidth: bytes per second, read and written together.
    """
    return sum(
        max(operation.macs / macs_per_second, operation.values * itemsize / bandwidth)
        for operation in operations
    )


def forward_floor(layer: Linear, tokens: int, method: str, r: int) -> float:
    """Return the multiply-adds of a forward over the frozen layer's."""
    adapted, frozen = (forward_operations(layer, tokens, one, r) for one in (method, "frozen"))
    return macs(adapted) / macs(frozen)


def step_floor(layer: Linear, tokens: int, method: str, r: int) -> float:
    """Return the multiply-adds of a training step over the frozen layer's."""
    adapted, frozen = (step_operations(layer, tokens, one, r) for one in (method, "frozen"))
    return macs(adapted) / macs(frozen)


def kept_bytes(
    layer: Linear, tokens: int, method: str, r: int, itemsize: int, rank: float | None = None
) -> float:
    """Return the bytes kept from forward to backward, beyond the frozen layer's own.

    The input counts here although some other layer may keep it as well (an activation that keeps
    its output, or a second projection of the same input).
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
    """A Llama-family decoder by its sizes.

    Args:
        name: what it is called.
        hidden: width of the residual stream.
        feed_forward: width inside of the feed-forward layers.
        layers: number of decoder layers.
        queries: width of all query heads together.
        keys: width of all key heads together, and of the values'.
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
        one = [
            Linear(h, q),
            Linear(h, k),
            Linear(h, k),
            Linear(q, h),
            Linear(h, f),
            Linear(h, f),
            Linear(f, h),
        ]
        return one * self.layers

    @property
    def inputs(self) -> list[int]:
        """The widths of the distinct inputs of those: q, k, v share one, gate and up another."""
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
"""Of the sizes of Llama 2."""


def _other_step_macs(model: Decoder, batch: int, length: int) -> float:
    """The multiply-adds that no adapter changes: the head, and causal attention's products."""
    head = 2 * batch * length * model.hidden * model.vocabulary
    # Two products forward, four backward, half of each masked.
    attention = 6 * batch * length * length * model.queries * model.layers / 2
    return head + attention


def decoder_step_floor(
    model: Decoder, batch: int, length: int, method: str, r: int, rank: float | None = None
) -> float:
    """Return the multiply-adds of a whole model's training step over the frozen model's.

    All products count: the projections, the head and attention.

    Args:
        model: its sizes.
        batch: number of sequences.
        length: tokens in each.
        method: one of METHODS.
        r: shard size.
        rank: LoRA's, one for all layers; by default that of as many parameters.
    """
    rank = lora_rank(model.linears, r) if rank is None else rank
    other = _other_step_macs(model, batch, length)
    frozen, adapted = (
        sum(macs(step_operations(layer, batch * length, one, r, rank)) for layer in model.linears)
        + other
        for one in ("frozen", method)
    )
    return adapted / frozen


@dataclass(frozen=True)
class Hardware:
    """What one device can do at most.

    Args:
        name: what it is called.
        flops: dense 16-bit operations per second, a multiply-add being two.
        memory_bandwidth: bytes per second to and from its memory.
        link_bandwidth: bytes per second to the other devices, in one direction.
    """

    name: str
    flops: float
    memory_bandwidth: float
    link_bandwidth: float


HARDWARE = Hardware("H100 SXM (data sheet)", 989e12, 3.35e12, 450e9)


@dataclass(frozen=True)
class Prediction:
    """What a training step, and decoding, of a whole model take; per device where not said else.

    Attributes:
        trainable: adapter parameters of the whole model.
        weight_bytes: 16-bit base weights, sharded over the devices.
        state_bytes: of the adapter: 16-bit values and gradients, float32 master and two moments.
        kept_bytes: kept for backward by the adapters alone, distinct inputs counted once.
        step_ratio: multiply-adds over the frozen model's.
        step_seconds: for those at the device's peak: no step can be faster.
        gather_bytes: received per step to gather sharded base weights, forward and backward.
        reduce_bytes: sent per step to average the adapter's gradients.
        link_seconds: for both at the peak of the link.
        decode_seconds: to read all weights and the adapter for one token on one device.
        decode_ratio: bytes moved by the projections for one token over the frozen ones'.
    """

    trainable: float
    weight_bytes: float
    state_bytes: float
    kept_bytes: float
    step_ratio: float
    step_seconds: float
    gather_bytes: float
    reduce_bytes: float
    link_seconds: float
    decode_seconds: float
    decode_ratio: float


def predict(
    model: Decoder,
    method: str,
    *,
    r: int,
    batch: int,
    length: int,
    devices: int = 1,
    hardware: Hardware = HARDWARE,
) -> Prediction:
    """Return what the paper says of a model on some devices, each with a batch of its own.

    The base is sharded over all of them (as `fully_shard` does), the adapter averaged.

    Args:
        model: its sizes.
        method: one of METHODS.
        r: shard size.
        batch: sequences on each device.
        length: tokens in each.
        devices: how many.
        hardware: what each of them is.
    """
    tokens, itemsize, layers = batch * length, 2, model.linears
    rank = lora_rank(layers, r)
    trainable = sum(adapter_parameters(layer, method, r, rank) for layer in layers)
    weights = model.weights * itemsize
    products = sum(macs(step_operations(layer, tokens, method, r, rank)) for layer in layers)
    products += _other_step_macs(model, batch, length)
    received = (devices - 1) / devices
    gathered = 2 * weights * received
    reduced = 2 * trainable * itemsize * received
    decoded, plain = (
        sum(moved_bytes(forward_operations(layer, 1, one, r, rank), itemsize) for layer in layers)
        for one in (method, "frozen")
    )
    head = model.hidden * model.vocabulary * itemsize
    return Prediction(
        trainable=trainable,
        weight_bytes=weights / devices,
        state_bytes=trainable * (2 + 2 + 4 + 4 + 4),
        kept_bytes=_kept_in_decoder(model, layers, tokens, method, r, rank, itemsize),
        step_ratio=decoder_step_floor(model, batch, length, method, r),
        step_seconds=2 * products / hardware.flops,
        gather_bytes=gathered,
        reduce_bytes=reduced,
        link_seconds=(gathered + reduced) / hardware.link_bandwidth,
        decode_seconds=(decoded + head) / hardware.memory_bandwidth,
        decode_ratio=decoded / plain,
    )


def _kept_in_decoder(
    model: Decoder,
    layers: Sequence[Linear],
    tokens: int,
    method: str,
    r: int,
    rank: float,
    itemsize: int,
) -> float:
    own = {"bone": r, "lora": rank}.get(method, 0)
    inputs = sum(model.inputs) if method in ("bat", "lora") else 0
    return tokens * itemsize * (own * len(layers) + inputs)
