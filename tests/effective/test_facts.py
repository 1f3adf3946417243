"""What an operation asks of an effective weight without its values: W answers."""

import pytest
import torch
from torch import nn

import disha
from disha.effective.weight import EffectiveWeight
from tests.conftest import (
    merged_weight,
)
from tests.effective.weights import adapted_weight


def test_facts_are_those_of_the_base():
    layer, weight = adapted_weight()
    base = layer.base_weight
    assert weight.shape == base.shape
    assert len(weight) == 3
    assert (weight.dtype, weight.device, weight.ndim) == (base.dtype, base.device, 2)
    assert (weight.size(), weight.stride(), weight.numel()) == (base.shape, base.stride(), 12)
    assert weight.requires_grad == base.requires_grad is False
    assert weight.is_floating_point()
    assert weight.is_contiguous()
    assert base.is_same_size(other=weight)
    assert not weight.is_sparse
    assert torch.is_floating_point(weight)
    assert weight.element_size() == 4
    assert weight.type() == torch.typename(weight) == "torch.FloatTensor"
    assert isinstance(weight.type(torch.float64), EffectiveWeight)
    torch.testing.assert_close(weight.type(torch.float64), merged_weight(layer).double())


@pytest.mark.parametrize(
    "ask",
    [
        lambda w: w.new_zeros(2),
        lambda w: w.new_tensor([1.0, 2.0]),
        lambda w: torch.ones_like(w),
        lambda w: torch.full_like(input=w, fill_value=2.0),
        lambda w: torch.ones(2).type_as(w),
        lambda w: torch.ones(2).to(w),
        lambda w: torch.ones(2).to(tensor=w),
        lambda w: torch.result_type(torch.ones(2), w),
        lambda w: torch.result_type(tensor=torch.ones(2), other=w),
    ],
)
def test_what_only_asks_for_the_dtype_computes_nothing(ask):
    """A computed weight can't have dropout, so computing one would raise."""
    layer = disha.BoneLinear(4, 3, r=2, dropout=0.5, dtype=torch.float64)
    found, expected = ask(layer.weight), ask(layer.base_weight)
    assert getattr(found, "dtype", found) == torch.float64
    if isinstance(found, torch.Tensor):
        assert type(found) is torch.Tensor
        assert torch.equal(found, expected)


def test_values_of_a_new_tensor_have_the_update():
    layer, weight = adapted_weight()
    dense = merged_weight(layer)
    with pytest.warns(UserWarning, match="To copy construct from a tensor"):
        found = weight.new_tensor(weight)
    torch.testing.assert_close(found, dense)


def test_hooks_are_those_of_the_base():
    layer, seen = disha.inject_adapters(nn.Linear(4, 3), "", 2, freeze=False), []
    handle = layer.weight.register_hook(lambda gradient: seen.append(gradient.shape))
    layer.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight))
    layer.weight.retain_grad()
    layer(torch.randn(2, 4)).sum().backward()
    assert seen[0] == (3, 4)
    assert seen[1] is layer.base_weight
    handle.remove()
    layer(torch.randn(2, 4)).sum().backward()
    assert len(seen) == 3
