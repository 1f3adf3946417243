"""What conversions ask of a base checkpoint: weights and shapes by the names of the adapter."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import disha
from disha import AdapterFileError
from disha.interop.checkpoints import base_shapes, base_weights, open_checkpoint


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.linear = nn.Linear(8, 6)


def saved(path, state=None):
    """Write a base and an adapter of it; return the checkpoint, the header and the model."""
    torch.manual_seed(0)
    model = Model()
    save_file(dict(model.state_dict()) if state is None else state(model), path / "base")
    adapted = disha.inject_adapters(model, "linear|attention", r=4, method="bat")
    disha.save_adapter(adapted, path / "adapter")
    return open_checkpoint(path / "base"), disha.inspect_adapter(path / "adapter"), adapted


def prefixed(model):
    return {f"model.{key}": value for key, value in model.state_dict().items()}


@pytest.mark.parametrize("state", [None, prefixed], ids=["same names", "one more prefix"])
def test_weights_of_layers_and_of_packed_projections(tmp_path, state):
    checkpoint, header, model = saved(tmp_path, state)
    weight = base_weights(checkpoint, header)
    assert torch.equal(weight("linear"), model.linear.base_weight)
    assert torch.equal(weight("attention.out_proj"), model.attention.out_proj.base_weight)
    records = {layer.name: layer for layer in header.layers}
    packed = model.attention._parameters["in_proj_weight"]
    for name, expected in zip("qkv", packed.split(8), strict=True):
        name = f"attention.{name}_proj"
        assert torch.equal(weight(name), packed)
        assert torch.equal(records[name].adapted_part(packed), expected)


def test_shapes_of_parameters(tmp_path):
    checkpoint, _, _ = saved(tmp_path, prefixed)
    shape = base_shapes(checkpoint, ["linear.weight", "linear.bias", "other.weight"])
    assert shape("linear.weight") == (6, 8)
    assert shape("linear.bias") == (6,)
    assert shape("other.weight") is None


def without(model):
    return {k: v for k, v in model.state_dict().items() if k != "linear.weight"}


def integers(model):
    return {k: v.to(torch.int8) for k, v in model.state_dict().items()}


def single(model):
    return {**model.state_dict(), "linear.weight": torch.tensor(1.0)}


def changed(model):
    return {k: v + 1 for k, v in model.state_dict().items()}


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (
            without,
            "no weight for layer 'linear': there is no .*; similar names: linear.bias",
        ),
        (integers, "linear.weight: is stored as I8"),
        (changed, "other values"),
        (single, r"linear.weight: the weight has the shape \(\); the adapter is for \(6, 8\)"),
    ],
)
def test_refused(tmp_path, state, says):
    checkpoint, header, _ = saved(tmp_path, state)
    weight = base_weights(checkpoint, header)
    with pytest.raises(AdapterFileError, match=says):
        weight("linear")
