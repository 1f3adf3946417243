"""Rotary position embedding: angles that grow with a token's position, one frequency per pair.

    f_i     = base^(-2i / d) / factor_i                 for i = 0 ... d / 2 - 1
    rot(x)  = x cos(p f) + (-x_2, x_1) sin(p f)         with x = (x_1, x_2), halves of a head

Models made for long contexts divide the frequencies by factors:

    llama3      1 where the wavelength 2 pi / f_i is short, one factor where it is long, and a
                mixture of both in between
    GGUF        the file lists one factor per frequency

Sources: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021; Chen et
al., "Extending Context Window of Large Language Models via Positional Interpolation", 2023; for
llama3, the release of Llama 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Rotation", "llama3_factors", "rotary_frequencies"]


def rotary_frequencies(
    head_dim: int,
    base: float,
    factors: Sequence[float] | None,
    device: torch.device | None = None,
) -> Tensor:
    """Return the angle per token of each pair, (head_dim / 2,), in float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / base**exponents
    return frequencies if factors is None else frequencies / torch.tensor(factors, device=device)


def llama3_factors(
    head_dim: int, base: float, factor: float, low: float, high: float, context: float
) -> tuple[float, ...]:
    """Return the factors by which Llama 3.1 divides the frequencies.

    Args:
        head_dim: width of one head.
        base: base of the frequencies.
        factor: the divisor of the lowest frequencies.
        low: wavelengths above `context / low` tokens are long.
        high: wavelengths below `context / high` tokens are short; greater than `low`.
        context: the longest sequence before scaling, in tokens.
    """
    wavelengths = 2 * math.pi / rotary_frequencies(head_dim, base, None).double()
    kept = (context / wavelengths - low) / (high - low)
    kept = kept.clamp(0.0, 1.0)  # 0 where the wavelength is long, 1 where it is short
    return tuple((1 / ((1 - kept) / factor + kept)).tolist())


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of the rotary angles, (time, head_dim) or (batch, 1, time, head_dim)."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Rotation:
        """Return the rotation at positions (..., time)."""
        angles = positions.float().unsqueeze(-1) * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return cls(angles.cos().to(dtype), angles.sin().to(dtype))

    def apply(self, x: Tensor) -> Tensor:
        """Rotate pairs (i, i + head_dim / 2) of the last axis of x (..., time, head_dim)."""
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-second, first), dim=-1) * self.sin
