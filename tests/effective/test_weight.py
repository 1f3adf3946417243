"""The effective weight: what computes it, and what it is to code that does not ask for it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import disha
from disha import ArgumentError, ModeError
from tests.conftest import (
    freshly_compiled,
    merged_weight,
    perturb,
    pickled,
)
from tests.effective.weights import adapted_weight


def test_everything_else_computes():
    layer, weight = adapted_weight()
    dense = merged_weight(layer)
    for compute in (torch.norm, torch.exp, lambda w: w.view(-1), lambda w: w[0, 1], torch.diag):
        found = compute(weight)
        assert type(found) is torch.Tensor
        torch.testing.assert_close(found, compute(dense))
    torch.testing.assert_close(torch.stack([weight, weight])[1], dense)
    assert str(weight) == str(dense)


def test_a_parameter_made_of_it_is_refused_or_dense():
    layer, weight = adapted_weight()
    assert type(nn.Parameter(weight.clone()).data) is torch.Tensor
    for view in (weight, weight.data, weight.detach(), weight[:2]):
        with pytest.raises(ArgumentError, match=r"weight\.clone\(\).*layer\.base_weight"):
            nn.Parameter(view)
    with pytest.raises(TypeError, match=r"cannot assign .* as parameter 'weight'"):
        nn.Linear(4, 3).weight = layer.weight


def test_attributes_of_the_parameter():
    layer, weight = adapted_weight()
    layer.base_weight.infshape = (4, 3)
    weight._no_weight_decay = True
    assert layer.weight.infshape == (4, 3)
    assert layer.base_weight._no_weight_decay is True
    assert not hasattr(weight, "no_such_attribute")


def test_compiled_code_reads_attributes_of_the_parameter():
    layer, _ = adapted_weight()
    layer.base_weight.factor = 3.0
    x = torch.randn(2, 4)
    compiled = freshly_compiled(lambda x: F.linear(x, layer.weight) * layer.weight.factor)
    torch.testing.assert_close(compiled(x), 3.0 * F.linear(x, layer.weight))


def test_as_another_class_it_is_computed():
    layer, _ = adapted_weight()
    dense = layer.weight.as_subclass(torch.Tensor)
    torch.testing.assert_close(dense, merged_weight(layer))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("clone", [copy.deepcopy, pickled])
def test_copies_of_it_are_dense(clone, grad):
    if grad and clone is pickled:
        pytest.skip("torch pickles no tensor with a graph")
    layer, _ = adapted_weight()
    with torch.set_grad_enabled(grad):
        copied = clone(layer.weight)
    assert type(copied) is torch.Tensor
    assert not copied.requires_grad
    torch.testing.assert_close(copied, merged_weight(layer))
    other = disha.BoneLinear(4, 3, r=2)
    other.weight.data = clone(layer).weight.data
    torch.testing.assert_close(other.base_weight, merged_weight(layer))


class TestWhatGoesAroundTorchFunction:
    """As C++ extensions do, and classes whose `__torch_function__` switches that of others off."""

    def multiply(self, x, weight):
        with torch._C.DisableTorchFunctionSubclass():
            return F.linear(x, weight)

    def test_without_gradients_the_weight_is_computed(self):
        layer = disha.BoneLinear(6, 4, r=2, init="kaiming")
        x = torch.randn(3, 6)
        with torch.no_grad():
            output = self.multiply(x, layer.weight)
        torch.testing.assert_close(output, F.linear(x, merged_weight(layer)))

    def test_a_block_that_would_get_no_gradient_raises(self):
        layer = disha.BoneLinear(6, 4, r=2)
        with pytest.raises(ModeError, match=r"aten\.\w+\.default.*\(4, 6\).*weight\.clone\(\)"):
            self.multiply(torch.randn(3, 6), layer.weight)
        torch.testing.assert_close(
            self.multiply(torch.ones(1, 6), layer.weight.clone()),
            F.linear(torch.ones(1, 6), layer.weight),
        )

    def test_a_frozen_block_lets_the_gradient_of_the_input_pass(self):
        layer = perturb(disha.BoneLinear(6, 4, r=2))
        layer.requires_grad_(False)
        x = torch.randn(3, 6, requires_grad=True)
        (found,) = torch.autograd.grad(self.multiply(x, layer.weight).sum(), x)
        torch.testing.assert_close(found, merged_weight(layer).sum(0).expand(3, 6))

    def test_a_write_goes_to_the_base(self):
        layer = disha.BoneLinear(6, 4, r=2, init="kaiming")
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            layer.weight.fill_(2.0)
        assert torch.equal(layer.base_weight, torch.full((4, 6), 2.0))
