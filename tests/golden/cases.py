"""Models whose adapter files are kept. From the first release on, nothing here may change.

All values come from `pattern`, exact in every dtype, and not from a random generator, which may
give other numbers in another version of torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import disha

FOLDER = Path(__file__).parent
OUTPUTS = FOLDER / "outputs.json"


def pattern(shape, seed):
    """Return a tensor of multiples of 1/64 between -1 and 1, which looks random."""
    numbers = (torch.arange(torch.Size(shape).numel()) * 31 + seed * 57) % 127
    return ((numbers**3 + 3 * numbers**2) % 127 - 63).view(shape) / 64


def fill(parameters, seed):
    """Give each parameter a pattern of its own."""
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.copy_(pattern(parameter.shape, seed + i))


def linears():
    return nn.Sequential(nn.Linear(10, 13), nn.Tanh(), nn.Linear(13, 6, bias=False))


class Kinds(nn.Module):
    """An embedding, a convolution, a transposed one with groups, and a norm."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.transposed = nn.ConvTranspose1d(8, 6, 2, groups=2)
        self.norm = nn.LayerNorm(6)

    def forward(self, tokens):
        x = self.transposed(self.conv(self.embedding(tokens).transpose(-1, -2)))
        return self.norm(x.transpose(-1, -2))


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Layouts(nn.Module):
    """Experts that are multiplied from the left, an embedding with a padding row, and some rows."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6, padding_idx=2)
        self.experts = nn.Parameter(torch.zeros(3, 6, 5))
        self.linear = nn.Linear(5, 9)

    def forward(self, tokens):
        return self.linear(torch.einsum("bti,eio->bto", self.embedding(tokens), self.experts))


@dataclass(frozen=True)
class Case:
    """A model, an adapter of it, and an input.

    Args:
        make: makes the model, whose values are overwritten.
        adapter: arguments of `inject_adapters`.
        input: shape of the input; of tokens where it has one size.
        dtype: dtype of the model.
        beside: names of the parameters trained beside the blocks.
        metadata: notes in the file.
    """

    make: Callable[[], nn.Module]
    adapter: dict[str, Any]
    input: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    beside: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)

    def base(self) -> nn.Module:
        """Return the model without its adapter."""
        model = self.make().to(self.dtype).eval()
        fill(model.parameters(), seed=1)
        return model

    def trained(self) -> nn.Module:
        """Return the model with its adapter, as if it had been trained."""
        model = disha.inject_adapters(self.base(), **self.adapter)
        fill(disha.adapter_parameters(model), seed=100)
        fill(map(model.get_parameter, self.beside), seed=200)
        return model

    def inputs(self) -> torch.Tensor:
        if len(self.input) == 1:
            return torch.arange(self.input[0])[None] % 11
        return pattern(self.input, seed=300).to(self.dtype)

    def values(self, model: nn.Module) -> list[torch.Tensor]:
        """Return what `trained` has given to the adapter of a model."""
        return [*disha.adapter_parameters(model), *map(model.get_parameter, self.beside)]


CASES = {
    "bone": Case(
        linears,
        {"target_regex": "0|2", "r": 4, "scale": 0.5, "dropout": 0.25},
        input=(2, 10),
    ),
    "bfloat16": Case(
        linears, {"target_regex": "all-linear", "r": 3}, input=(2, 10), dtype=torch.bfloat16
    ),
    "tile": Case(
        linears,
        {"target_regex": "^2$", "r": 5, "r_out": 3},
        input=(2, 10),
        dtype=torch.float16,
    ),
    "bat": Case(
        linears,
        {"target_regex": "all-linear", "r": 4, "method": "bat", "rank_pattern": {"2": 5}},
        input=(2, 10),
    ),
    "kinds": Case(
        Kinds,
        {"target_regex": ".", "r": 3, "also_train": r"norm\.", "dtype": torch.float64},
        input=(5,),
        beside=("norm.weight", "norm.bias"),
        metadata={"task": "every kind", "author": "Ærøskøbing \N{SAILBOAT}"},
    ),
    "attention": Case(
        SelfAttention, {"target_regex": "attention", "r": 4, "method": "bat"}, input=(1, 3, 6)
    ),
    "layouts": Case(
        Layouts,
        {
            "target_regex": ".",
            "r": 4,
            "layouts": {"experts": "expert in out"},
            "rows": {"linear": [(1, 3), (5, 9)]},
        },
        input=(5,),
    ),
}
"""What `make.py` wrote a file for, `format1-<name>.safetensors`."""


def file_of(name: str) -> Path:
    return FOLDER / f"format1-{name}.safetensors"
