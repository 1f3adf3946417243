"""The model that hostile files are loaded into, the adapters it has, and all of its state."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import disha
from disha.layers import AdaptedLayer
from tests.conftest import perturb

__all__ = ["ADAPTERS", "Subject", "adapted", "plain", "seed_files", "state_of"]


class Subject(nn.Module):
    """Layers of many kinds, a buffer, and a module and its parameters under two names each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8, padding_idx=5)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.body = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.last = self.body[1]
        self.head = nn.Linear(8, 12, bias=False)
        self.register_buffer("steps", torch.arange(3.0))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = self.norm(x + self.attn(x, x, x, need_weights=False)[0])
        for layer in self.body:
            x = x + layer(x)
        return self.head(x)


@dataclass(frozen=True)
class _Adapter:
    target: str
    r: int
    options: dict[str, Any]
    metadata: dict[str, str]


ADAPTERS = (
    _Adapter("body|head", 3, {"also_train": r"norm\.weight"}, {"note": "ä", "task": "a"}),
    _Adapter("body|head", 3, {"method": "bat"}, {}),
    _Adapter("body|head", 2, {"r_out": 4, "scale": 0.5}, {}),
    _Adapter("attn|body", 2, {"dtype": torch.bfloat16, "also_train": "bias"}, {}),
    _Adapter("embed|conv|head", 4, {"rank_pattern": {"conv": 2}, "dtype": torch.float64}, {}),
    _Adapter("body|head", 4, {"rows": {"head": [(0, 4), (8, 10)]}}, {}),
    _Adapter("all-linear", 2, {"exclude": "head", "dropout": 0.1}, {}),
)
"""What the files are made from: every kind of block, many layouts, three dtypes."""


def plain() -> Subject:
    """Return the model without any adapter; the same values each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Subject()


def adapted(which: int) -> Subject:
    """Return the model with the adapter that the file `which` is made from, trained."""
    adapter, model = ADAPTERS[which], plain()
    disha.inject_adapters(model, adapter.target, adapter.r, **adapter.options)
    perturb(model, seed=which)
    return model


@functools.cache
def seed_files() -> tuple[bytes, ...]:
    """Return the bytes of a valid file for each adapter."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "adapter.safetensors")
        files = []
        for which, adapter in enumerate(ADAPTERS):
            disha.save_adapter(adapted(which), path, metadata=adapter.metadata)
            files.append(path.read_bytes())
    return tuple(files)


def bits(tensor: Tensor) -> tuple[Any, ...]:
    """Return a tensor's dtype, shape and bytes: equal if and only if all bits are."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return (tensor.dtype, tuple(tensor.shape), data.numpy().tobytes())


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return everything that a refused operation must leave as it was, to the bit."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        state[name] = (
            id(module),
            type(module),
            module.training,
            sorted(module.__dict__),
            [
                (key, id(p), p.requires_grad, bits(p))
                for key, p in module._parameters.items()
                if p is not None
            ],
            [(key, bits(b)) for key, b in module._buffers.items() if b is not None],
            _adapters_of(module),
        )
    return state


def _adapters_of(module: nn.Module) -> list[Any]:
    if not isinstance(module, AdaptedLayer):
        return []
    held = module.disha
    blocks = [
        (name, block.scale, block.dropout, block.config) for name, block in held.blocks().items()
    ]
    return [held.active, held.acts(), held.merged, blocks]
