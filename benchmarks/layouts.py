"""Small whole models, one for each layout of weights. Some tables have a row for each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LAYOUTS", "Whole"]

TOKENS = 24
VOCABULARY = 40
EXPERTS = 4


@dataclass(frozen=True)
class Whole:
    """A model whose weights have one layout.

    Args:
        build: makes the model, of a width.
        shape: of its input, for a width.
        target: a regex for the weights to adapt.
        options: of `inject_adapters`.
        peft: what PEFT calls the same weights; empty if it can't adapt them.
        miss: whether PEFT's MiSS can.
        has_indices: whether the input is indices.
        routes: whether each sample can have an adapter of its own.
        compiles: whether torch compiles the model; it leaves recurrent layers to Python.
        compiled_dtype: in which it does. Grouped products are compiled in bfloat16 only.
    """

    build: Callable[[int], nn.Module]
    shape: Callable[[int], tuple[int, ...]]
    target: str = "0|2"
    options: Mapping[str, Any] = field(default_factory=dict)
    peft: Mapping[str, Any] = field(default_factory=dict)
    miss: bool = False
    has_indices: bool = False
    routes: bool = True
    compiles: bool = True
    compiled_dtype: torch.dtype = torch.float32

    def inputs(self, width: int, seed: int = 0) -> Tensor:
        """Return a random input."""
        generator = torch.Generator().manual_seed(seed)
        if self.has_indices:
            return torch.randint(VOCABULARY, self.shape(width), generator=generator)
        return torch.randn(self.shape(width), generator=generator)


class _Embedded(nn.Module):
    """An embedding, and a head that stays as it is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, width), nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.silu(self.head(F.silu(self.embed(tokens))))


class _Attending(nn.Module):
    """Attention with a packed weight for queries, keys and values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(x)
        return x + self.attn(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]


class _Recurrent(nn.Module):
    """A recurrent layer. Of this kind, torch has no fused kernel that only some devices know."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rnn = nn.RNN(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.rnn(x)[0])


class _Experts(nn.Module):
    """Stacked experts (experts, in, out) that each multiply their own tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, width, width) / width**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, width, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiplied(F.silu(self.multiplied(x, self.up)), self.down)

    def multiplied(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the product of the tokens of each expert with its matrix."""
        return torch.bmm(x.unflatten(0, (EXPERTS, -1)), weight).flatten(0, 1)


class _GroupedExperts(_Experts):
    """The same, in one product of groups of any size."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        ends = torch.arange(1, EXPERTS + 1, dtype=torch.int32) * (TOKENS // EXPERTS)
        self.register_buffer("ends", ends)

    def multiplied(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the product of the tokens of each expert with its matrix."""
        return torch._grouped_mm(x, weight, offs=self.ends)


def _conv1d_of_gpt2(width: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(2 * width, width), nn.SiLU(), Conv1D(width, 2 * width))


def _tokens(width: int) -> tuple[int, ...]:
    return (TOKENS, width)


def _sequences(width: int) -> tuple[int, ...]:
    return (4, TOKENS // 4, width)


_LISTED = {"target_modules": ["0", "2"]}
_STACKS = {"layouts": {"up|down": "expert in out"}}

LAYOUTS: Mapping[str, Whole] = {
    "linear (out in)": Whole(
        lambda width: nn.Sequential(
            nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        ),
        _tokens,
        peft=_LISTED,
        miss=True,
    ),
    "Conv1D of GPT-2 (in out)": Whole(_conv1d_of_gpt2, _tokens, peft=_LISTED),
    "convolution": Whole(
        lambda width: nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 1)
        ),
        lambda width: (4, width, 6, 6),
        peft=_LISTED,
    ),
    "embedding": Whole(
        _Embedded,
        lambda _: (4, TOKENS // 4),
        target="embed",
        peft={"target_modules": ["embed"]},
        has_indices=True,
    ),
    "packed attention": Whole(
        _Attending, _sequences, target="attn", peft={"target_modules": ["attn"]}
    ),
    "recurrent": Whole(_Recurrent, _sequences, target="rnn", routes=False, compiles=False),
    "experts, batched": Whole(_Experts, _tokens, "up|down", _STACKS, routes=False),
    "experts, grouped": Whole(
        _GroupedExperts,
        _tokens,
        target="up|down",
        options=_STACKS,
        routes=False,
        compiled_dtype=torch.bfloat16,
    ),
}
"""A name of the layout -> a model whose weights have it."""
