"""Blocks: when they get their values, and which parameters are theirs."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import disha
from tests.conftest import perturb, seed_torch

SETTINGS = {
    "bone": {"target_regex": "0", "r": 2},
    "bat": {"target_regex": "0", "r": 2, "method": "bat"},
    "kaiming": {"target_regex": "0", "r": 2, "init": "kaiming"},
    "rows": {"target_regex": "0", "r": 2, "also_train_rows": {"1": [1, 3]}},
}


def build(device):
    seed_torch(0)
    with torch.device(device):
        return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8))


@pytest.fixture(params=SETTINGS)
def settings(request):
    return SETTINGS[request.param]


class TestToEmpty:
    """The blocks start as `init` says when memory comes, not as it was left by others."""

    @pytest.fixture(params=["meta", "cpu"])
    def model(self, request, settings, monkeypatch):
        model = disha.inject_adapters(build(request.param), **settings)
        # What memory holds is up to chance.
        empty_like = torch.empty_like
        monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(1e23))
        return model.to_empty(device="cpu")

    def test_then_the_base_is_loaded(self, model, settings):
        base = build("cpu")
        model.load_state_dict(base.state_dict())
        expected = disha.inject_adapters(build("cpu"), **settings)
        x = torch.randn(3, 6)
        for ours, theirs in zip(
            disha.adapter_parameters(model), disha.adapter_parameters(expected), strict=True
        ):
            assert ours.abs().max() < 1
            if settings.get("init") != "kaiming":
                assert torch.equal(ours, theirs)
                assert torch.equal(model(x), base(x))

    def test_a_checkpoint_with_blocks_decides(self, model, settings):
        trained = perturb(disha.inject_adapters(build("cpu"), **settings))
        model.load_state_dict(trained.state_dict())
        x = torch.randn(3, 6)
        assert torch.equal(model(x), trained(x))


def test_blocks_stay_as_they_are_in_a_cast_or_a_later_checkpoint(settings):
    model = perturb(disha.inject_adapters(build("cpu"), **settings))
    expected = [block.detach().clone() for block in disha.adapter_parameters(model)]
    model.double().load_state_dict(build("cpu").state_dict(), strict=False)
    for block, values in zip(disha.adapter_parameters(model), expected, strict=True):
        assert torch.equal(block, values.double())


class OwnBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.my_block = nn.Parameter(torch.zeros(4))


def test_a_parameter_of_the_user_may_be_called_a_block():
    """The checkpoint is one of the base, and brings the base's running statistics."""
    model = disha.inject_adapters(OwnBlock(), "layer", 2)
    base = OwnBlock()
    base.norm(torch.randn(8, 4))
    model.load_state_dict(base.state_dict())
    assert list(disha.adapter_state_dict(model)) == ["layer.disha.default.bone_block"]


class TestWrittenByHand:
    """What a user writes into a block or its layer acts, or raises."""

    @pytest.mark.parametrize("compiled", [False, True])
    def test_a_scale(self, compiled):
        layer = disha.inject_adapters(nn.Linear(4, 4), "all-linear", 2, init="kaiming")
        run = torch.compile(layer, backend="eager") if compiled else layer
        x = torch.randn(3, 4)
        run(x)
        layer.disha["default"].scale = 0
        torch.testing.assert_close(run(x), nn.functional.linear(x, layer.base_weight, layer.bias))

    def test_what_is_active(self):
        layer = disha.inject_adapters(nn.Linear(4, 4), "all-linear", 2, init="kaiming")
        layer.disha.active = ()
        x = torch.randn(3, 4)
        assert torch.equal(layer(x), nn.functional.linear(x, layer.base_weight, layer.bias))

    def test_a_state_dict_has_a_scale_that_was_set(self):
        layer = disha.inject_adapters(nn.Linear(4, 4), "all-linear", 2, init="kaiming")
        assert not any("scale" in key for key in layer.state_dict())
        disha.set_adapter_scale(layer, 0.25)
        equal = disha.inject_adapters(nn.Linear(4, 4), "all-linear", 2)
        assert not any(equal.load_state_dict(layer.state_dict()))
        x = torch.randn(3, 4)
        assert torch.equal(equal(x), layer(x))
        as_configured = disha.inject_adapters(nn.Linear(4, 4), "all-linear", 2).state_dict()
        of_adapter = {key: as_configured[key] for key in as_configured if "disha" in key}
        loads = [partial(equal.load_state_dict, strict=False)]
        loads.append(partial(disha.load_adapter_state_dict, equal))
        for load in loads:
            disha.set_adapter_scale(equal, 0.25)
            load(of_adapter)
            assert equal.disha["default"].scale == 1

    @pytest.mark.parametrize("scale", [float("nan"), float("inf")])
    def test_a_state_dict_with_a_scale_that_is_not_finite_is_refused(self, scale):
        layer = disha.inject_adapters(nn.Linear(4, 4), "all-linear", 2)
        state = layer.state_dict() | {"disha.default.scale": torch.tensor(scale)}
        with pytest.raises(RuntimeError, match=r"disha\.default\.scale must be finite"):
            layer.load_state_dict(state)
        assert layer.disha["default"].scale == 1

    def test_a_pruned_block_says_so(self):
        layer = disha.inject_adapters(nn.Linear(4, 4), "all-linear", 2, init="kaiming")
        prune.l1_unstructured(layer.disha["default"], "bone_block", 0.5)
        with pytest.raises(disha.ModeError, match=r"pruned or parametrised.*prune\.remove"):
            layer(torch.randn(3, 4))

    def test_parameters_have_the_order_of_the_model(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
        disha.inject_adapters(model, "all-linear", 2, also_train="1")
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(a is b for a, b in zip(disha.adapter_parameters(model), trained, strict=True))
