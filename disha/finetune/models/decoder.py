"""The decoder of Llama, Mistral, Qwen2 and Qwen3 in plain PyTorch.

Modules and parameters have the names of the usual checkpoints
(``model.layers.0.self_attn.q_proj.weight`` ...), so that state dicts and adapter files carry over.

    h   = h + O softmax(rot(Q x) rot(K x)^T / sqrt(d)) V x      with x = rmsnorm(h)
    h   = h + down(silu(gate x) * up x)                         with x = rmsnorm(h)
    out = head(rmsnorm(h))

The configuration can add what only some families have: biases; an RMSNorm of every query and key
head before rotation (Qwen3); and a sliding window (Mistral). With a window, a token attends only to
the last `window` tokens, including itself.

Batches are padded on the right. Attention is causal, so no real token sees the padding, and no mask
is needed.

Sources: Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023; Jiang et
al., "Mistral 7B", 2023; the technical reports of Qwen2, 2024, and Qwen3, 2025.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from disha.finetune.errors import CheckpointError
from disha.finetune.models.rope import Rotation, rotary_frequencies

__all__ = ["Decoder", "DecoderConfig", "KeyValueCache"]

LARGEST_SIZE = 1 << 20
"""The limit of every size. No real model reaches it, and torch can make weights up to it."""


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes and constants of a decoder.

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
        rope_factors: the head_dim / 2 numbers that divide the rotary frequencies; None if nothing
            divides them.
        qkv_bias: whether the projections of queries, keys and values have a bias.
        head_norm: whether every query and key head is normalised before rotation.
        window: how many tokens a token attends to; None for all tokens before it.

    Raises:
        CheckpointError: a size is not positive, is far too large, or contradicts another size.
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
    rope_factors: tuple[float, ...] | None = None
    qkv_bias: bool = False
    head_norm: bool = False
    window: int | None = None

    def __post_init__(self) -> None:
        sizes = ("vocabulary", "hidden", "feed_forward", "layers", "heads", "kv_heads", "head_dim")
        for name in (*sizes, "context", "rope_base", "norm_epsilon"):
            if not 0 < getattr(self, name) < math.inf:
                raise CheckpointError(
                    f"the model's {name} must be greater than 0, got {getattr(self, name)}"
                )
        for name in sizes:
            if getattr(self, name) > LARGEST_SIZE:
                raise CheckpointError(
                    f"the model's {name} must be at most {LARGEST_SIZE}, got {getattr(self, name)}"
                )
        if self.heads % self.kv_heads:
            raise CheckpointError(
                f"the model's {self.kv_heads} key/value heads must divide its {self.heads} heads"
            )
        if self.head_dim % 2:
            raise CheckpointError(
                f"the rotary embedding needs heads of even width, got {self.head_dim}"
            )
        if self.rope_factors is not None and not (
            len(self.rope_factors) == self.head_dim // 2
            and all(0 < factor < math.inf for factor in self.rope_factors)
        ):
            raise CheckpointError(
                f"the model's rotary frequencies must be divided by {self.head_dim // 2} finite "
                f"numbers greater than 0, got {self.rope_factors[:4]}"
            )
        if self.window is not None and self.window < 1:
            raise CheckpointError(
                f"the model's sliding window must be greater than 0 tokens, got {self.window}"
            )


class KeyValueCache:
    """Keys and values of the tokens seen so far, of every layer. It grows as needed."""

    def __init__(self) -> None:
        self._held: dict[int, Tensor] = {}
        self._length = 0

    @property
    def length(self) -> int:
        """The number of tokens held per sequence."""
        return self._length

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add one layer's keys and values (batch, kv_heads, time, head_dim); return all of them."""
        end = self._length + keys.shape[2]
        held = self._held.get(layer)
        if held is None or held.shape[3] < end:
            grown = keys.new_empty(2, *keys.shape[:2], 2 * end, keys.shape[3])
            if held is not None:
                grown[:, :, :, : self._length] = held[:, :, :, : self._length]
            held = self._held[layer] = grown
        held[0, :, :, self._length : end] = keys
        held[1, :, :, self._length : end] = values
        return held[0, :, :, :end], held[1, :, :, :end]

    def advance(self, tokens: int) -> None:
        """Count `tokens` as seen, once every layer has added them."""
        self._length += tokens

    def cut(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        self._length = min(length, self._length)


class Attention(nn.Module):
    """Causal attention with grouped key and value heads."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = config.heads, config.kv_heads
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden, bias=False)
        norms = config.head_dim, config.norm_epsilon
        self.q_norm = nn.RMSNorm(*norms) if config.head_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(*norms) if config.head_norm else nn.Identity()

    def forward(
        self, x: Tensor, rotation: Rotation, seen: Tensor | None, cache: KeyValueCache | None
    ) -> Tensor:
        """Attend within x (batch, time, hidden) and to what the cache holds.

        Args:
            x: the normalised residual stream.
            rotation: the rotation at the tokens' positions.
            seen: which token may attend to which, (time, keys) or (batch, 1, time, keys).
                With None, each token attends to itself and all tokens before it, and the cache
                must be empty.
            cache: the keys and values are added to it.
        """
        q = rearrange(self.q_proj(x), "b t (h d) -> b h t d", h=self.heads)
        k = rearrange(self.k_proj(x), "b t (h d) -> b h t d", h=self.kv_heads)
        v = rearrange(self.v_proj(x), "b t (h d) -> b h t d", h=self.kv_heads)
        q, k = rotation.apply(self.q_norm(q)), rotation.apply(self.k_norm(k))
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
        self.input_layernorm = nn.RMSNorm(config.hidden, config.norm_epsilon)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden, config.norm_epsilon)

    def forward(
        self, x: Tensor, rotation: Rotation, seen: Tensor | None, cache: KeyValueCache | None
    ) -> Tensor:
        """Transform x (batch, time, hidden); the other arguments are those of `Attention`."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, seen, cache)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class DecoderBody(nn.Module):
    """The decoder without its head."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocabulary, config.hidden)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, config.norm_epsilon)

    def forward(
        self,
        tokens: Tensor,
        cache: KeyValueCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states (batch, time, hidden) of tokens (batch, time).

        Args:
            tokens: token ids.
            cache: the tokens before these; `tokens` are added to it.
            positions: (batch, time) the place of each token in its own text, for rows that hold
                several texts. Each 0 begins a text, and no text attends to another.

        Raises:
            ValueError: positions are given, but the cache already holds tokens.
        """
        x = self.embed_tokens(tokens)
        start, time = (0 if cache is None else cache.length), tokens.shape[1]
        if positions is not None and start:
            raise ValueError("rows of several texts can't continue a cache; pass them complete")
        rotation = self._rotation(start, time, positions, x)
        seen = self._seen(start, time, positions, x.device)
        for layer in self.layers:
            x = layer(x, rotation, seen, cache)
        if cache is not None:
            cache.advance(time)
        return self.norm(x)  # type: ignore[no-any-return]

    def _rotation(self, start: int, time: int, positions: Tensor | None, x: Tensor) -> Rotation:
        config = self.config
        frequencies = rotary_frequencies(
            config.head_dim, config.rope_base, config.rope_factors, x.device
        )
        if positions is None:
            places = torch.arange(start, start + time, device=x.device)
        else:
            places = positions.unsqueeze(1)
        return Rotation.at(places, frequencies, x.dtype)

    def _seen(
        self, start: int, time: int, positions: Tensor | None, device: torch.device
    ) -> Tensor | None:
        """Return the mask; None if a token sees all earlier ones. No mask is fastest."""
        if positions is not None:
            full = _same_text(positions)
        elif start:
            full = torch.ones(time, start + time, dtype=torch.bool, device=device).tril(start)
        else:
            full = None
        window = self.config.window
        if window is None or start + time <= window:
            return full
        near = torch.ones(time, start + time, dtype=torch.bool, device=device)
        near = near.tril(start).triu(start - window + 1)
        return near if full is None else full & near


def _same_text(positions: Tensor) -> Tensor:
    """Return a mask (batch, 1, time, time): a token sees the earlier ones of its own text."""
    text = (positions == 0).cumsum(dim=-1)
    return (text.unsqueeze(-1) == text.unsqueeze(-2)).tril().unsqueeze(1)


class Decoder(nn.Module):
    """A language model of one of the families above.

    Args:
        config: sizes and constants. With `config.tied_head`, head and embedding are one tensor.
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

    def get_output_embeddings(self) -> nn.Linear:
        """Return the head, as models of `transformers` do."""
        return self.lm_head

    def forward(
        self,
        tokens: Tensor,
        cache: KeyValueCache | None = None,
        positions: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """Return the logits (batch, time, vocabulary) of tokens (batch, time).

        Args:
            tokens: token ids. They continue the tokens in the cache, and are added to it.
            cache: the tokens before these.
            positions: for rows of several texts; see `DecoderBody.forward`.
            logits_to_keep: return the logits of this many of the last tokens; 0 for all tokens.
        """
        hidden = self.model(tokens, cache, positions)
        return self.lm_head(hidden[:, -logits_to_keep:])  # type: ignore[no-any-return]
