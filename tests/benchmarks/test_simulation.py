"""The memory of a step is simulated as the allocator gives it out."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import disha
from benchmarks.fits import checked, simulated
from disha.effective import EffectiveWeight
from disha.finetune.memory import step_memory


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


def test_a_simulated_step_leaves_the_next_one_as_it_is():
    """The optimizer, its state and the gradients are those that they were."""
    models = [torch.nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    steps = []
    for model in models:
        disha.inject_adapters(model, "all-linear", r=2)
        optimizer = torch.optim.AdamW(disha.adapter_parameters(model))
        steps.append((model, optimizer))
    x = torch.randn(3, 6)
    for _ in range(2):  # without state, and with it
        step_memory(models[0], steps[0][1], lambda: models[0](x).square().mean())
        for model, optimizer in steps:
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for simulated_too, plain in zip(*map(disha.adapter_parameters, models), strict=True):
        assert torch.equal(simulated_too, plain)
        assert plain.any()


def test_weights_in_four_bits_take_the_place_of_others():
    whole, packed = (
        simulated(1, 1, 64, "small", "bone", "one process", bits, False, 16)["weights"]
        for bits in (16, 4)
    )
    assert packed < 0.4 * whole  # the embedding and the head stay
