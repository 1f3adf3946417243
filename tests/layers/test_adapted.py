"""AdaptedLayer: users' classes keep what they do, and get no more names than three."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import disha
from disha import DishaError
from tests import reference
from tests.conftest import refused
from tests.functional.matrices import close_to_exact
from tests.layers.test_linear import KINDS, Doubling, born, fill, inject, oracle, subclass_layer
from tests.reference import METHODS


class ByItself(nn.Linear):
    """Its forward does without that of nn.Linear."""

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Sometimes(nn.Linear):
    """It reaches the forward of nn.Linear for some inputs only."""

    def forward(self, x):
        if x.dim() > 2:
            return F.linear(x, self.weight, self.bias)
        return super().forward(x)


class InParts(nn.Linear):
    """It calls itself for the parts of a long input."""

    def forward(self, x):
        if len(x) > 1:
            return torch.cat([self(part) for part in x.split(1)])
        return 2 * super().forward(x + 1)


SUBCLASSES = (Doubling, ByItself, Sometimes, InParts)


def over_merged_weight(layer, cls, x):
    """The output of the user's own class on the oracle's merged weight."""
    plain = cls(10, 9, dtype=torch.float64)
    block = layer.disha["default"]
    with torch.no_grad():
        merged = reference.merged_weight(
            layer.base_weight, [(block.method.name, block.block, block.scale)]
        )
        plain.weight.copy_(merged)
        plain.bias.copy_(layer.bias)
    return plain(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cls", SUBCLASSES)
def test_subclass_computes_its_own_forward_over_the_merged_weight(cls, kind):
    layer = subclass_layer(cls, kind)
    assert isinstance(layer, cls)
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in ((3, 10), (2, 3, 10))]
    expected = [over_merged_weight(layer, cls, x) for x in inputs]
    for x, wanted in zip(inputs, expected, strict=True):
        close_to_exact(layer(x), wanted)
        assert torch.equal(layer(x=x), layer(x))
    disha.merge_adapters(layer)
    for x, wanted in zip(inputs, expected, strict=True):
        close_to_exact(layer(x), wanted)


def test_a_layer_whose_class_was_changed_keeps_its_adapters():
    layer = fill(inject(nn.Linear(10, 9), "bat"))
    original, x = type(layer), torch.randn(3, 10)
    layer.__class__ = type("Changed", (original,), {})
    with pytest.raises(DishaError, match="has become a Changed since it was adapted"):
        disha.remove_adapters(layer)
    close_to_exact(layer(x), oracle(layer, x), 1e-5)
    layer.__class__ = original
    disha.remove_adapters(layer)
    assert type(layer) is nn.Linear


class Gained(nn.Linear):
    """It makes its weight of the one that is kept, without a parametrization."""

    weight = property(lambda self: self.gain * self._parameters["weight"])

    def __init__(self, *sizes):
        super().__init__(*sizes)  # which must not find the weight there yet
        self.gain = 3.0


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_that_the_class_computes_is_the_one_that_is_multiplied(method):
    layer, x = Gained(8, 8), torch.randn(2, 8)
    expected = layer(x)
    disha.inject_adapters(layer, "all-linear", 4, method=method)
    torch.testing.assert_close(layer(x), expected)


class Pair(nn.Linear):
    """It returns a tuple, and does without the forward of nn.Linear."""

    def forward(self, x):
        return F.linear(x, self.weight, self.bias), x


class KeywordOnly(nn.Linear):
    def forward(self, *, x):
        return F.linear(x, self.weight, self.bias)


def test_subclass_that_returns_a_tuple():
    layer = fill(inject(Pair(10, 9), "bone"))
    x = torch.randn(3, 10)
    output, same = layer(x)
    close_to_exact(output, oracle(layer, x), 1e-5)
    assert same is x


def test_options_of_a_class_reach_another_base_of_it():
    class Labelled:
        def __init_subclass__(cls, label):
            cls.label = label

    class Layer(disha.BoneLinear, Labelled, label="query"):
        pass

    assert Layer(4, 3, r=2).label == "query"


def test_subclass_takes_a_keyword_only_input():
    layer = fill(inject(KeywordOnly(10, 9), "bone"))
    x = torch.randn(3, 10)
    close_to_exact(layer(x=x), oracle(layer, x), 1e-5)


class FromBase(nn.Linear):
    """Has a parameter with the name of an attribute of adapted layers."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.base_weight = nn.Parameter(torch.randn_like(self.weight))

    def forward(self, x):
        return F.linear(x, self.base_weight + self.weight)


class Shaped(nn.Linear):
    """Has names of its own that an adapted layer could have had."""

    def geometry(self):
        return 2.0

    def merged_weight(self):
        return 3.0

    def forward(self, x):
        return super().forward(x) * self.geometry() * self.merged_weight()


def test_module_with_a_name_that_adapting_adds_is_refused():
    model, x = nn.Sequential(FromBase(10, 9)), torch.randn(3, 10)
    expected = model(x)
    with refused(model, DishaError, "its own attribute 'base_weight'"):
        disha.inject_adapters(model, "^0$", 2)
    assert torch.equal(model(x), expected)


def test_adapting_adds_three_public_names():
    model, x = nn.Sequential(Shaped(10, 9)), torch.randn(3, 10)
    expected, before = model(x), set(dir(model[0]))
    disha.inject_adapters(model, "^0$", 2)
    added = {name for name in set(dir(model[0])) - before if not name.startswith("_")}
    assert added == {"disha", "base_weight", "delta_weight"}
    assert torch.equal(model(x), expected)


def test_module_with_an_attribute_of_our_name_is_refused():
    layer = nn.Linear(10, 9)
    layer.disha = "mine"
    with refused(layer, DishaError, "its own attribute 'disha'"):
        disha.inject_adapters(layer, "all-linear", 2)
    assert layer.disha == "mine"


def test_reset_parameters_while_merged_is_refused():
    layer = fill(born("bone"))
    disha.merge_adapters(layer)
    with pytest.raises(disha.MergeError, match="can't reset parameters"):
        layer.reset_parameters()


def test_a_layer_whose_weight_is_not_adapted_has_no_base_weight():
    layer = disha.inject_adapters(nn.MultiheadAttention(8, 2), "^q_proj$", 2)
    assert not hasattr(layer, "base_weight")


@pytest.mark.parametrize("outputs", [2, 8])
def test_a_weight_of_other_sizes_does_not_take_the_place_of_an_adapted_one(outputs):
    layer = disha.inject_adapters(nn.Linear(6, 4), "", 2)
    with pytest.raises(disha.ArgumentError, match=r"blocks do not fit; remove the adapters"):
        layer.weight = nn.Parameter(torch.zeros(outputs, 6))
    layer.weight = nn.Parameter(torch.zeros(4, 6))
    assert not layer.base_weight.any()
