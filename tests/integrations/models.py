"""Models that the trainers of several libraries train, and what they must save of them."""

import pytest
import torch
from bitsandbytes.nn import LinearNF4
from torch import nn

import disha

FILES = {"adapter.safetensors", "model.safetensors.index.json"}


def net(linear=nn.Linear, **buffers):
    torch.manual_seed(0)
    model = nn.Sequential(linear(16, 16), nn.LayerNorm(16), linear(16, 4)).to("cpu")
    for name, value in buffers.items():
        model.register_buffer(name, value)
    return disha.inject_adapters(model, "0|2", r=4, also_train="1")


def in_4_bits(inputs, outputs):
    return LinearNF4(inputs, outputs, compute_dtype=torch.float32)  # quantised by `.to()`


BASES = pytest.mark.parametrize("linear", [nn.Linear, in_4_bits])


def assert_same(model, other):
    """Compare the states of two models bit for bit."""
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)
