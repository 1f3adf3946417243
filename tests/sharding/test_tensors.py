"""What of sharded tensors needs no ranks; `tests/distributed` has the rest."""

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.tensor import Placement, Replicate, Shard

import disha
from disha.files.saving import adapter_contents
from disha.model.view import ModelView
from disha.sharding.ranks import Ranks
from disha.sharding.tensors import (
    gather,
    is_sharded,
    local_part,
    local_ranges,
    reason_against_writing,
    write,
)


@dataclass
class Mesh:
    shape: tuple[int, ...]
    coordinate: tuple[int, ...]

    def get_coordinate(self):
        return list(self.coordinate)

    def size(self, dim):
        return self.shape[dim]


@dataclass
class Sharded:
    shape: tuple[int, ...]
    device_mesh: Mesh
    placements: tuple[Placement, ...]


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    mesh=st.lists(st.integers(1, 5), min_size=1, max_size=2),
    data=st.data(),
)
def test_parts_are_the_chunks_of_torch(shape, mesh, data):
    choices = st.sampled_from([Replicate(), *(Shard(dim) for dim in range(len(shape)))])
    placements = tuple(data.draw(choices) for _ in mesh)
    coordinate = tuple(data.draw(st.integers(0, size - 1)) for size in mesh)
    values = torch.arange(torch.Size(shape).numel()).view(shape)
    expected = values
    for size, index, placement in zip(mesh, coordinate, placements, strict=True):
        if isinstance(placement, Shard):
            chunks = expected.chunk(size, placement.dim)
            nothing = expected.narrow(placement.dim, 0, 0)  # torch gives no empty chunks
            expected = chunks[index] if index < len(chunks) else nothing
    ranges = local_ranges(Sharded(tuple(shape), Mesh(tuple(mesh), coordinate), placements))
    part = values[tuple(slice(start, stop) for start, stop in ranges)]
    assert torch.equal(part, expected)


def test_plain_tensors_are_whole():
    tensor = torch.randn(3, 4)
    assert not is_sharded(tensor)
    assert gather(tensor) is tensor
    assert local_part(tensor) is tensor
    assert reason_against_writing(tensor, tensor) is None
    target = torch.zeros(3, 4)
    write(target, tensor)
    assert torch.equal(target, tensor)


def test_a_plain_model_is_alone():
    model = nn.Linear(2, 2)
    assert not ModelView(model).is_sharded
    ranks = ModelView(model).ranks
    assert ranks.writes
    with pytest.raises(KeyError, match="as it is"), ranks.fail_together("fail"):
        raise KeyError("as it is")


TAKEN = "take adapter 'default' out of the model"
ASKED = {
    "save adapter 'default'": lambda model, path: disha.save_adapter(model, path),
    "load a file as adapter 'default'": lambda model, path: disha.load_adapter(
        model, path, replace=True
    ),
    "load a state dict as adapter 'default'": lambda model, path: disha.load_adapter_state_dict(
        model, disha.adapter_state_dict(model)
    ),
    TAKEN: lambda model, path: adapter_contents(ModelView(model)),
}


@pytest.mark.parametrize("action", ASKED)
def test_ranks_agree_on_what_they_were_asked(monkeypatch, tmp_path, action):
    model = disha.inject_adapters(nn.Sequential(nn.Linear(4, 4)), "0", r=2)
    disha.save_adapter(model, tmp_path / "a")
    asked = []

    def be_the_only_rank(ranks, parameters):
        ranks.groups = (Mesh((1,), (0,)),)
        ranks.writes = True

    def note_and_return(ranks, report):
        asked.append(report[1])
        return [report]

    monkeypatch.setattr(Ranks, "__init__", be_the_only_rank)
    monkeypatch.setattr(Ranks, "_exchange", note_and_return)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: 0)
    ASKED[action](model, tmp_path / "a")
    assert action in asked
    assert set(asked) <= {action, TAKEN}


def test_plain_models_do_not_bring_in_the_machinery_of_torch():
    """It takes seconds to import."""
    code = """
import sys, tempfile
import einops, torch
einops.rearrange(torch.zeros(1), "a -> a")  # early releases bring in some of it by themselves
before = set(sys.modules)
import disha
model = disha.inject_adapters(torch.nn.Linear(4, 4), "all-linear", 2)
with tempfile.TemporaryDirectory() as folder:
    disha.save_adapter(model, folder + "/a")
    disha.load_adapter(model, folder + "/a", replace=True)
disha.merge_adapters(model)
heavy = {"torch.distributed.tensor", "torch.distributed.fsdp", "torch._dynamo"}
sys.exit(str(heavy & (set(sys.modules) - before)) if heavy & (set(sys.modules) - before) else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
