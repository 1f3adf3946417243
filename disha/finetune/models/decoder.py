"""A small Llama-family decoder in plain PyTorch.

Modules and parameters have the names of the usual Llama checkpoints
(``model.layers.0.self_attn.q_proj.weight`` ...), so that state dicts and adapter files carry over.

    h   = h + O softmax(rot(Q x) rot(K x)^T / sqrt(d)) V x      with x = rmsnorm(h)
    h   = h + down(silu(gate x) * up x)                         with x = rmsnorm(h)
    out = head(rmsnorm(h))

Batches are padded on the right: attention is causal, so no real token ever sees the padding and
no mask is needed.

Source: Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from disha.finetune.data.examples import IGNORED
from disha.finetune.errors import CheckpointError

__all__ = ["IGNORED", "Decoder", "DecoderConfig", "KeyValueCache", "generate_greedily"]


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes and constants of a Llama-family decoder.

    Args:
        vocabulary: number of token ids.
        hidden: width of the residual stream.
        feed_forward: width of the gated feed-forward layers.
        layers: number of decoder layers.
        heads: number of query heads.
        kv_heads: number of key and value heads, which divides `heads`.
        head_dim: width of one head; even.
        context: longest sequence, in tokens.
        rope_base: base of the rotary frequencies.
        norm_epsilon: added to the mean square in RMSNorm.
        tied_head: whether the output head is the token embedding.

    Raises:
        CheckpointError: a size is not positive, or sizes don't go together.
    """

    vocabulary: int
    hidden: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    rope_base: float
    norm_epsilon: float
    tied_head: bool

    def __post_init__(self) -> None:
        sizes = ("vocabulary", "hidden", "feed_forward", "layers", "heads", "kv_heads", "head_dim")
        for name in (*sizes, "context", "rope_base", "norm_epsilon"):
            if not getattr(self, name) > 0:
                raise CheckpointError(
                    f"the model's {name} must be greater than 0, got {getattr(self, name)}"
                )
        if self.heads % self.kv_heads:
            raise CheckpointError(
                f"the model's {self.kv_heads} key/value heads must divide its {self.heads} heads"
            )
        if self.head_dim % 2:
            raise CheckpointError(
                f"the rotary embedding needs heads of even width, got {self.head_dim}"
            )


class KeyValueCache:
    """Keys and values of the tokens seen so far, with room for `capacity` tokens.

    Args:
        config: the model's sizes.
        batch: number of sequences.
        capacity: most tokens per sequence.
        dtype: of the keys and values.
        device: where they are kept.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (config.layers, batch, config.kv_heads, capacity, config.head_dim)
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty(shape, dtype=dtype, device=device)
        self._length = 0

    @property
    def length(self) -> int:
        """Tokens held per sequence."""
        return self._length

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add one layer's keys and values (batch, kv_heads, time, head_dim); return all of them."""
        end = self._length + keys.shape[2]
        self._keys[layer, :, :, self._length : end] = keys
        self._values[layer, :, :, self._length : end] = values
        return self._keys[layer, :, :, :end], self._values[layer, :, :, :end]

    def advance(self, tokens: int) -> None:
        """Count `tokens` as seen, once every layer has added them."""
        self._length += tokens


@dataclass(frozen=True)
class _Rotation:
    """Cosines and sines of the rotary angles, (time, head_dim) or (batch, 1, time, head_dim)."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, config: DecoderConfig, dtype: torch.dtype) -> _Rotation:
        """The rotation at positions (..., time)."""
        device = positions.device
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
        frequencies = 1.0 / config.rope_base ** (exponents / config.head_dim)
        angles = positions.float().unsqueeze(-1) * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return cls(angles.cos().to(dtype), angles.sin().to(dtype))

    def apply(self, x: Tensor) -> Tensor:
        """Rotate pairs (i, i + head_dim / 2) of the last axis of x (..., time, head_dim)."""
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-second, first), dim=-1) * self.sin


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, the division in float32."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., size)."""
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)
        normalised = F.rms_norm(x.float(), self.weight.shape, None, self.epsilon)
        return self.weight * normalised.to(x.dtype)


class Attention(nn.Module):
    """Causal attention with grouped key and value heads."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = config.heads, config.kv_heads
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden, bias=False)

    def forward(
        self, x: Tensor, rotation: _Rotation, seen: Tensor | None, cache: KeyValueCache | None
    ) -> Tensor:
        """Attend within x (batch, time, hidden) and to what the cache holds."""
        q = rearrange(self.q_proj(x), "b t (h d) -> b h t d", h=self.heads)
        k = rearrange(self.k_proj(x), "b t (h d) -> b h t d", h=self.kv_heads)
        v = rearrange(self.v_proj(x), "b t (h d) -> b h t d", h=self.kv_heads)
        q, k = rotation.apply(q), rotation.apply(k)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=seen is None, enable_gqa=True
        )
        return self.o_proj(rearrange(y, "b h t d -> b t (h d)"))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """Gated feed-forward layer: down(silu(gate x) * up x)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.feed_forward, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.feed_forward, bias=False)
        self.down_proj = nn.Linear(config.feed_forward, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform x (..., hidden)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """One layer: attention, then feed-forward, each after a norm and with a residual."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden, config.norm_epsilon)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.norm_epsilon)

    def forward(
        self, x: Tensor, rotation: _Rotation, seen: Tensor | None, cache: KeyValueCache | None
    ) -> Tensor:
        """Transform x (batch, time, hidden)."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, seen, cache)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class DecoderBody(nn.Module):
    """The decoder without its head."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocabulary, config.hidden)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_epsilon)

    def forward(
        self,
        tokens: Tensor,
        cache: KeyValueCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (batch, time, hidden) of tokens (batch, time).

        Args:
            tokens: token ids.
            cache: what came before; `tokens` are added to it.
            positions: (batch, time) the place of each token in its own text, where several texts
                stand in one row: every 0 begins a text, and no text attends to another.
        """
        x = self.embed_tokens(tokens)
        start, time = (0 if cache is None else cache.length), tokens.shape[1]
        seen = None
        if positions is not None:
            seen = _same_text(positions)
            rotation = _Rotation.at(positions.unsqueeze(1), self.config, x.dtype)
        else:
            places = torch.arange(start, start + time, device=x.device)
            rotation = _Rotation.at(places, self.config, x.dtype)
            if cache is not None:
                seen = torch.ones(time, start + time, dtype=torch.bool, device=x.device).tril(start)
        for layer in self.layers:
            x = layer(x, rotation, seen, cache)
        if cache is not None:
            cache.advance(time)
        return self.norm(x)  # type: ignore[no-any-return]


def _same_text(positions: Tensor) -> Tensor:
    """Which token (batch, 1, time, time) may attend to which: those before it in its own text."""
    text = (positions == 0).cumsum(dim=-1)
    return (text.unsqueeze(-1) == text.unsqueeze(-2)).tril().unsqueeze(1)


class Decoder(nn.Module):
    """A Llama-family language model.

    Args:
        config: sizes and constants. With `config.tied_head` the head's weight *is* the embedding.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = DecoderBody(config)
        self.lm_head = nn.Linear(config.hidden, config.vocabulary, bias=False)
        self.tie_head()

    def tie_head(self) -> None:
        """Share the head's weight with the embedding, if the configuration says so."""
        if self.config.tied_head:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Logits (batch, time, vocabulary) of tokens (batch, time).

        With a cache, `tokens` go on from what it holds, and are added to it.
        """
        return self.lm_head(self.model(tokens, cache))  # type: ignore[no-any-return]

    def summed_loss(
        self, tokens: Tensor, labels: Tensor, positions: Tensor | None = None
    ) -> Tensor:
        """Cross-entropy summed over the positions that have a label, in nats and float32.

        The vocabulary dwarfs every other size, so logits are made at those positions only.

        Args:
            tokens: (batch, time) token ids.
            labels: (batch, time) the token that should follow each, or `IGNORED`.
            positions: (batch, time) as `DecoderBody.forward` takes them, for packed rows.
        """
        supervised = labels != IGNORED
        logits = self.lm_head(self.model(tokens, positions=positions)[supervised])
        return F.cross_entropy(logits.float(), labels[supervised], reduction="sum")


@torch.inference_mode()
def generate_greedily(
    model: Decoder, prompt: Iterable[int], *, max_new_tokens: int, stop: int | None = None
) -> Iterator[int]:
    """Yield the most likely continuation, token by token.

    Args:
        model: the language model.
        prompt: token ids, at least one.
        max_new_tokens: most tokens to yield.
        stop: the token id that ends the text; it is not yielded.
    """
    weight = model.model.embed_tokens.weight
    tokens = torch.tensor([list(prompt)], device=weight.device)
    capacity = tokens.shape[1] + max_new_tokens
    cache = KeyValueCache(
        model.config, batch=1, capacity=capacity, dtype=weight.dtype, device=weight.device
    )
    for _ in range(max_new_tokens):
        hidden = model.model(tokens, cache)
        tokens = model.lm_head(hidden[:, -1:]).argmax(dim=-1)
        token = int(tokens)
        if token == stop:
            return
        yield token
