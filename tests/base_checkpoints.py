"""What the tests of base checkpoints share: a base, an adapter file, and both merged."""

import json
import os

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import disha
from disha.interop.checkpoints import merge_into_checkpoint
from tests.conftest import perturb


class Zoo(nn.Module):
    """A layer of every layout, and one with rows; no size is a multiple of 3."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.padded = nn.Embedding(11, 8, padding_idx=4)
        self.sliced = nn.Linear(8, 10)
        self.recurrent = nn.LSTM(8, 5)
        self.experts = nn.Parameter(torch.randn(4, 8, 5))
        self.stacked = nn.Parameter(torch.randn(4, 5, 8))
        self.proj = nn.Linear(8, 10)
        self.conv = nn.Conv2d(8, 6, (3, 2), groups=2)
        self.up = nn.ConvTranspose1d(10, 4, 3, groups=2)
        self.packed = nn.MultiheadAttention(8, 2)
        self.apart = nn.MultiheadAttention(8, 2, kdim=5, vdim=7)
        self.norm = nn.LayerNorm(10)
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("nothing", torch.zeros(0, 4))


def save_sharded(state, folder, count, metadata=None):
    """Write a state dict as shards with an index, tensors dealt out in turn."""
    folder.mkdir(exist_ok=True)
    names = sorted(state)
    weight_map = {}
    for number in range(count):
        shard = f"model-{number + 1:05}-of-{count:05}.safetensors"
        held = {name: state[name].contiguous() for name in names[number::count]}
        save_file(held, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(held, shard))
    size = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": metadata or {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def tensors_in(path):
    """Return all tensors of a checkpoint as a loader sees them: through its index."""
    if path.is_file():
        return load_file(path)
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return load_file(path / "model.safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    found = {}
    for shard in sorted(set(weight_map.values())):
        held = load_file(path / shard)
        assert {name for name in weight_map if weight_map[name] == shard} == set(held)
        found.update(held)
    return found


def base_state(model):
    state = model.state_dict().items()
    return {name: value for name, value in state if "disha" not in name.split(".")}


class Setting:
    """A base checkpoint, an adapter file, and what merging in memory makes of the two."""

    def __init__(self, folder, model, target="all-linear", r=3, shards=3, **arguments):
        self.folder = folder
        self.base = save_sharded(model.state_dict(), folder / "base", shards)
        self.adapter = folder / "adapter.safetensors"
        self.out = folder / "merged"
        perturb(disha.inject_adapters(model, target, r, **arguments))
        disha.save_adapter(model, self.adapter)
        self.model = model

    def change(self, **tensors):
        """Write other tensors into the base; None takes one away."""
        state = tensors_in(self.base) | tensors
        kept = {name: tensor for name, tensor in state.items() if tensor is not None}
        save_sharded(kept, self.base, 3)

    def merge(self, **arguments):
        return merge_into_checkpoint(self.base, self.adapter, self.out, **arguments)

    def merged_in_memory(self):
        disha.merge_adapters(self.model)
        return base_state(self.model)

    def listing(self):
        return sorted(os.listdir(self.folder))
