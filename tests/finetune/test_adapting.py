from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import disha
from disha.finetune.adapting import (
    inject,
    plan,
    with_adapter,
    without_adapter,
)
from disha.finetune.settings import AdapterSettings

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def adapted(model):
    return {name for name, one in model.named_modules() if isinstance(one, disha.AdaptedLayer)}


def test_a_decoder_is_adapted_in_all_projections(tiny_model):
    inject(tiny_model, AdapterSettings(bone_r=4))
    found = adapted(tiny_model)
    assert {name.rpartition(".")[2] for name in found} == PROJECTIONS
    assert len(found) == 2 * len(PROJECTIONS)


def test_layers_are_left_out_or_have_another_r(tiny_model):
    settings = AdapterSettings(
        bone_r=4, exclude="mlp", rank_pattern=("v_proj=2", r"0\.self_attn=8")
    )
    inject(tiny_model, settings)
    ranks = {row.name: row.r for row in disha.summary(tiny_model).layers}
    assert {name.rpartition(".")[2] for name in ranks} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for name, r in ranks.items():
        assert r == (2 if "v_proj" in name else 8 if "0.self_attn" in name else 4), name


def test_any_other_model_is_adapted_in_all_linear_layers():
    model = nn.Sequential(nn.Linear(4, 6), nn.Conv1d(6, 6, 1), nn.Linear(6, 2))
    inject(model, AdapterSettings(bone_r=2))
    assert adapted(model) == {"0", "2"}


@pytest.mark.parametrize(
    "settings",
    [
        AdapterSettings(bone_r=4),
        AdapterSettings(bone_r=4, init_weights="bat"),
        AdapterSettings(bone_r=4, bone_r_out=8, target=r"q_proj$"),
        AdapterSettings(bone_r=4, also_train="norm", adapter_dropout=0.1),
    ],
    ids=lambda settings: f"{settings.title} {settings.also_train}",
)
def test_the_plan_is_what_is_done(tiny_model, settings):
    planned = plan(tiny_model, settings)
    assert adapted(tiny_model) == set()
    model = copy.deepcopy(tiny_model)
    inject(model, settings)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == planned.trainable
    assert any("norm" in name for name in trained) == (settings.also_train is not None)


def test_blocks_are_float32_whatever_the_model_is_kept_in(tiny_model):
    inject(tiny_model.bfloat16(), AdapterSettings(bone_r=4))
    blocks = list(disha.adapter_parameters(tiny_model))
    assert blocks
    assert {block.dtype for block in blocks} == {torch.float32}
    assert tiny_model.lm_head.weight.dtype == torch.bfloat16


def test_without_its_adapter_a_model_is_what_it_was(tiny_model):
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = tiny_model(tokens)
        values = inject(tiny_model, AdapterSettings(bone_r=4, also_train="layernorm|lm_head"))
        assert len(values) == 5
        for parameter in tiny_model.parameters():
            if parameter.requires_grad:
                parameter += 0.05
        trained = tiny_model(tokens)
        with without_adapter(tiny_model, values):
            assert torch.equal(tiny_model(tokens), before)
        assert torch.equal(tiny_model(tokens), trained)
        assert not torch.allclose(trained, before)


def test_an_adapter_of_another_model_is_refused(tmp_path, tiny_model):
    path = tmp_path / "adapter.safetensors"
    disha.save_adapter(disha.inject_adapters(tiny_model, "_proj$", 4), path)
    with pytest.raises(disha.DishaError):
        with_adapter(nn.Sequential(nn.Linear(3, 3)), path)
