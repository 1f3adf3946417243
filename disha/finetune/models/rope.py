"""Rotary position embedding: angles that grow with a token's place, one frequency per pair.

    f_i     = base^(-2i / d)                            for i = 0 ... d / 2 - 1
    rot(x)  = x cos(p f) + (-x_2, x_1) sin(p f)         with x = (x_1, x_2), halves of a head

Models made for long contexts scale the frequencies:

    linear      f_i / factor
    llama3      f_i where the wavelength 2 pi / f_i is short, f_i / factor where it is long, and a
                mixture of both between
    factors     f_i / factor_i, as GGUF files list them

Sources: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021; Chen et
al., "Extending Context Window of Large Language Models via Positional Interpolation", 2023; for
llama3, the release of Llama 3.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from disha.finetune.errors import CheckpointError

__all__ = [
    "FrequencyFactors",
    "LinearScaling",
    "Llama3Scaling",
    "RopeScaling",
    "Rotation",
    "rotary_frequencies",
]


@dataclass(frozen=True)
class LinearScaling:
    """Every frequency divided by `factor`.

    Raises:
        CheckpointError: the factor is not positive.
    """

    factor: float

    def __post_init__(self) -> None:
        _require_positive("linear", factor=self.factor)

    def scaled(self, frequencies: Tensor) -> Tensor:
        """Scale frequencies (head_dim / 2)."""
        return frequencies / self.factor


@dataclass(frozen=True)
class Llama3Scaling:
    """Long wavelengths divided by `factor`, short ones kept, and a smooth passage between.

    Args:
        factor: what the lowest frequencies are divided by.
        low: wavelengths above `context / low` tokens are long.
        high: wavelengths below `context / high` tokens are short.
        context: the longest sequence before scaling, in tokens.

    Raises:
        CheckpointError: a number is not positive, or `low` not below `high`.
    """

    factor: float
    low: float
    high: float
    context: float

    def __post_init__(self) -> None:
        _require_positive(
            "llama3",
            factor=self.factor,
            low_freq_factor=self.low,
            high_freq_factor=self.high,
            original_max_position_embeddings=self.context,
        )
        if not self.low < self.high:
            raise CheckpointError(
                f"the llama3 rotary scaling needs low_freq_factor below high_freq_factor, got "
                f"{self.low} and {self.high}"
            )

    def scaled(self, frequencies: Tensor) -> Tensor:
        """Scale frequencies (head_dim / 2)."""
        wavelengths = 2 * math.pi / frequencies
        kept = (self.context / wavelengths - self.low) / (self.high - self.low)
        kept = kept.clamp(0.0, 1.0)  # 0 where the wavelength is long, 1 where it is short
        return (1 - kept) * frequencies / self.factor + kept * frequencies


@dataclass(frozen=True)
class FrequencyFactors:
    """Every frequency divided by a factor of its own.

    Args:
        factors: head_dim / 2 numbers.

    Raises:
        CheckpointError: a factor is not positive.
    """

    factors: tuple[float, ...]

    def __post_init__(self) -> None:
        _require_positive("listed", smallest_factor=min(self.factors, default=math.nan))

    def scaled(self, frequencies: Tensor) -> Tensor:
        """Scale frequencies (head_dim / 2)."""
        return frequencies / torch.tensor(self.factors, device=frequencies.device)


RopeScaling = LinearScaling | Llama3Scaling | FrequencyFactors


def rotary_frequencies(
    head_dim: int, base: float, scaling: RopeScaling | None, device: torch.device | None = None
) -> Tensor:
    """The angle per token of each pair, (head_dim / 2), in float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / base**exponents
    return frequencies if scaling is None else scaling.scaled(frequencies)


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of the rotary angles, (time, head_dim) or (batch, 1, time, head_dim)."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Rotation:
        """The rotation at positions (..., time)."""
        angles = positions.float().unsqueeze(-1) * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return cls(angles.cos().to(dtype), angles.sin().to(dtype))

    def apply(self, x: Tensor) -> Tensor:
        """Rotate pairs (i, i + head_dim / 2) of the last axis of x (..., time, head_dim)."""
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-second, first), dim=-1) * self.sin


def _require_positive(kind: str, **numbers: float) -> None:
    for name, number in numbers.items():
        if not 0 < number < math.inf:
            raise CheckpointError(
                f"the {kind} rotary scaling's {name} must be greater than 0 and finite, got "
                f"{number}"
            )
