"""Models with adapters, and their files, for tests of what files hold."""

import json
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

import disha
from tests.conftest import Layered, perturb, seed_torch


class EveryKind(nn.Module):
    """Layers of every kind; it is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(14, 6)
        self.conv = nn.Conv2d(14, 6, (2, 3))
        self.grouped = nn.Conv1d(28, 6, 2, groups=2)
        self.up = nn.ConvTranspose1d(28, 12, 3, groups=2)
        self.embed = nn.Embedding(14, 6)
        self.padded = nn.Embedding(15, 6, padding_idx=3)
        self.attention = nn.MultiheadAttention(14, 2)


def every_kind(seed: int = 0, dtype: torch.dtype = torch.float64) -> EveryKind:
    """Return the model, with the same values for the same seed."""
    seed_torch(seed)
    return EveryKind().to(dtype)


def save(path: Path, *, seed: int = 1, scale: float = 1.0, base: int = 0, **injected) -> Path:
    """Save an adapter with random values, for the model of seed `base`."""
    arguments = {"target_regex": ".", "r": 4, **injected}
    model = perturb(disha.inject_adapters(every_kind(base), **arguments), seed)
    disha.set_adapter_scale(model, scale)
    disha.save_adapter(model, path)
    return path


def base(dtype=torch.float32):
    seed_torch(0)
    return Layered().to(dtype)


def trained(dtype=torch.float32, **arguments):
    options = {"target_regex": "proj|head", "r": 3, "also_train": r"norm\.weight"}
    options |= {"dtype": dtype, **arguments}
    return perturb(disha.inject_adapters(base(dtype), **options))


def rewritten(path, change_header=None, change_tensors=None):
    """Write the file again with its header or its tensors changed."""
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["disha"])
    tensors = safetensors.torch.load_file(path)
    if change_header:
        header = change_header(header) or header
    if change_tensors:
        change_tensors(tensors)
    text = header if isinstance(header, str) else json.dumps(header)
    safetensors.torch.save_file(tensors, path, metadata={"disha": text})


def first_layer(header):
    return header["layers"][0]
