"""The memory of a step is simulated as the allocator gives it out."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import disha
from benchmarks.fits import checked, simulated
from disha.effective import EffectiveWeight


@pytest.mark.parametrize(
    ("adapter", "way", "bits"),
    [("bat", "one process", 16), ("lora", "one process", 4), ("bone", "FSDP2", 4)],
)
def test_a_simulated_step_needs_what_the_allocator_gives_out(adapter, way, bits):
    simulated, real = checked(adapter, way, bits)
    assert abs(simulated - real) < 0.05 * real


def test_an_adapted_weight_of_a_fake_tensor_is_not_computed():
    with FakeTensorMode():
        layer = disha.inject_adapters(nn.Sequential(nn.Linear(6, 4)), "0", r=2)[0]
        weight = layer.weight
        assert type(weight) is EffectiveWeight
        assert weight.shape == (4, 6)
        assert weight.device == torch.device("cpu")
        nn.functional.linear(torch.ones(3, 6), weight).sum().backward()
        assert layer.weight.base.grad is None
        (block,) = disha.adapter_parameters(layer)
        assert block.grad.shape == block.shape


def test_weights_in_four_bits_take_the_place_of_others():
    whole, packed = (
        simulated(1, 1, 64, "small", "bone", "one process", bits, False, 16)["weights"]
        for bits in (16, 4)
    )
    assert packed < 0.4 * whole  # the embedding and the head stay
