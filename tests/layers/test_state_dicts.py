"""`load_state_dict` of a model with adapters, by a state dict of the base or one with blocks."""

import pytest
import torch
from torch import nn

import disha
from tests.conftest import perturb


@pytest.fixture
def adapted(model):
    return perturb(disha.inject_adapters(model, "proj", 2, also_train=r"norm\.weight"))


@pytest.mark.parametrize("prefix", ["", "outer."])
def test_a_state_that_lacks_the_blocks_of_a_layer(adapted, prefix):
    model = nn.ModuleDict({"outer": adapted}) if prefix else adapted
    state = model.state_dict()
    disha.inject_adapters(adapted, "proj", 2, adapter="b")  # the state lacks all of it
    absent = f"{prefix}layers.0.attn.v_proj.disha.default.bone_block"
    del state[absent]
    with pytest.raises(RuntimeError, match=f'Missing key.*: "{absent}"[.]'):
        model.load_state_dict(state)
    assert model.load_state_dict(state, strict=False).missing_keys == [absent]
    of_base = {key: value for key, value in state.items() if "disha" not in key}
    assert not any(model.load_state_dict(of_base))


def test_a_state_that_lacks_another_adapter_of_a_layer_that_is_named_like_ours():
    model = disha.inject_adapters(nn.ModuleDict({"disha": nn.Linear(4, 4)}), ".", 2)
    state = model.state_dict()
    assert not any(disha.inject_adapters(model, ".", 2, adapter="b").load_state_dict(state))


def test_a_buffer_that_is_named_like_a_block():
    def with_buffers():
        norm = nn.BatchNorm1d(4)
        norm.register_buffer("mask_block", torch.zeros(3))
        return nn.Sequential(nn.Linear(4, 4), norm)

    base = with_buffers()
    base[1].running_mean.fill_(2.0)
    adapted = disha.inject_adapters(with_buffers(), "0", 2)
    adapted.load_state_dict(base.state_dict())
    assert list(disha.adapter_state_dict(adapted)) == ["0.disha.default.bone_block"]
    disha.remove_adapters(adapted)
    assert torch.equal(adapted[1].running_mean, base[1].running_mean)


def test_no_hook_stays_on_the_model(adapted):
    adapted.load_state_dict(adapted.state_dict())
    assert not any(module._load_state_dict_pre_hooks for module in adapted.modules())


def test_a_state_of_a_part_that_lacks_a_block(adapted):
    part = adapted.layers[0].attn
    state = part.state_dict()
    del state["v_proj.disha.default.bone_block"]
    missing = part.load_state_dict(state, strict=False).missing_keys
    assert missing == ["v_proj.disha.default.bone_block"]


def test_a_part_of_a_base_that_is_loaded_later_says_what_the_buffers_were():
    model = disha.inject_adapters(
        nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))}), "0", 2
    )
    base = {"1.running_mean": torch.full((4,), 2.0)}
    model["body"].load_state_dict(base, strict=False)
    assert "body.1.running_mean" not in disha.adapter_state_dict(model)
