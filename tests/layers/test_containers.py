"""Modules that contain others, and have a matrix of their own, contain the same when adapted."""

import copy

import pytest
import torch
from torch import nn

import disha
from tests.conftest import perturb, pickled


class WithMatrix:
    """Adds a matrix to a container, which scales the input of its forward."""

    def __init__(self, *args):
        super().__init__(*args)
        self.mix = nn.Parameter(torch.randn(4, 4) / 2)


class Chain(WithMatrix, nn.Sequential):
    def forward(self, x):
        return super().forward(x @ self.mix)


class Parts(WithMatrix, nn.ModuleList):
    def forward(self, x):
        x = x @ self.mix
        for part in self:
            x = part(x)
        return self[-1](x)


class Named(WithMatrix, nn.ModuleDict):
    def forward(self, x):
        x = x @ self.mix
        for part in self.values():
            x = part(x)
        return x


class Two(WithMatrix, nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)


class Children(Two):
    def forward(self, x):
        x = x @ self.mix
        for child in self.children():
            x = child(x)
        return x


class ByMethod(Two):
    def forward(self, x):
        return self.run(x @ self.mix)

    def run(self, x):
        for _, child in self.named_children():
            x = child(x)
        return x


class Decorated(Two):
    """Each child adds to its input, so another child would show."""

    @torch.autocast("cpu", enabled=False)
    def forward(self, x):
        x = x @ self.mix
        return x + sum(child(x) for child in self.children())


class ByModules(Two):
    def forward(self, x):
        x = x @ self.mix
        for child in self._modules.values():
            x = child(x)
        return x


def containers():
    parts = [nn.Linear(4, 4), nn.Linear(4, 4)]
    named = Named(dict(zip("ab", parts, strict=True)))
    return [Chain(*parts), Parts(parts), named, Children(), ByMethod(), Decorated(), ByModules()]


def adapt(model):
    return disha.inject_adapters(model, "^mix$", 2, layouts={"^mix$": "in out"})


@pytest.mark.parametrize("number", range(7))
def test_injection_changes_nothing(number):
    model = containers()[number]
    x = torch.randn(3, 4)
    expected = model(x)
    names = [name for name, _ in model.named_children()]
    length = len(model) if hasattr(model, "__len__") else None
    adapt(model)
    assert torch.equal(model(x), expected)
    if length is not None:
        assert len(model) == length
        assert [name for name in model._modules if name != "disha"] == names
    perturb(model)
    assert not torch.equal(model(x), expected)
    for copied in (copy.deepcopy(model), pickled(model)):
        assert torch.equal(copied(x), model(x))
    assert "disha.default.mix.bone_block" in model.state_dict()
    disha.remove_adapters(model)
    assert torch.equal(model(x), expected)


def test_a_list_of_modules_changes_as_a_plain_one():
    model = adapt(Parts([nn.Linear(4, 4), nn.ReLU()]))
    model.append(nn.Tanh())
    model.insert(0, nn.Identity())
    del model[2]
    model += [nn.ReLU()]
    assert [type(part).__name__ for part in model] == ["Identity", "Linear", "Tanh", "ReLU"]
    assert [*model._modules] == ["0", "1", "2", "3", "disha"]
    assert isinstance(model, disha.AdaptedLayer)
    assert len(disha.adapter_parameters(model)) == 1
