"""LoRA that is a Bone adapter comes back as one."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import disha
from disha import AdapterFileError, ConversionError
from disha.files.contents import read_contents, write_contents
from disha.files.saving import adapter_contents
from disha.functional import Layout
from disha.interop import lora
from disha.interop.lora import write_lora
from disha.interop.peft_reading import read_folder
from disha.model.view import ModelView
from tests.conftest import Layered, assert_same, perturb, refused
from tests.language_models import gpt2, llama
from tests.lora_folders import TOKENS, adapted, output, served
from tests.peft_models import (
    rewrite,
    tensors_of,
    with_fields,
    with_tensor,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora_and_back_is_the_same_adapter(tmp_path, dtype):
    base = llama().eval().to(dtype)
    options = {"rank_pattern": {"q_proj": 3}, "scale": 0.3, "dropout": 0.1, "also_train": "norm"}
    ours = adapted(base, **options)
    lora.export(ours, tmp_path)
    again = copy.deepcopy(base)
    report = lora.load(again, tmp_path, "back")
    assert report.complete
    expected, found = adapter_contents(ModelView(ours)), adapter_contents(ModelView(again), "back")
    assert_same(found.tensors, expected.tensors)
    for layer, was in zip(found.layers, expected.layers, strict=True):
        assert layer.scale == pytest.approx(was.scale, rel=1e-15)
        assert replace(layer, scale=was.scale, base=was.base) == was
    assert found.config.dropout == 0.1
    torch.testing.assert_close(output(again, TOKENS), output(ours, TOKENS))


def test_embeddings_convolutions_and_tiles_come_back(tmp_path):
    base = with_embedding(4)
    base["conv"] = nn.Conv2d(5, 4, 3)
    ours = adapted(base, "embed|conv|linear", 2, r_out=2)
    lora.export(ours, tmp_path)
    again = copy.deepcopy(base)
    lora.load(again, tmp_path)
    for name in base:
        found, expected = again[name].disha["default"], ours[name].disha["default"]
        assert torch.equal(again[name].delta_weight(found), ours[name].delta_weight(expected))
        assert (found.r, found.r_out) == (2, None)


def with_embedding(padding=None):
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"embed": nn.Embedding(9, 6, padding_idx=padding), "linear": nn.Linear(7, 6)}
    )


@pytest.mark.parametrize("padding", [None, 4])
def test_embeddings_go_from_lora_to_a_file_and_back(tmp_path, padding):
    base = with_embedding(padding)
    ours = adapted(base, "embed|linear", 2, scale=0.5)
    lora.export(ours, tmp_path / "lora")
    contents = read_folder(tmp_path / "lora")
    assert {layer.name: layer.layout for layer in contents.layers} == {
        "embed": Layout("index out", padding_idx=padding),
        "linear": Layout("out in"),
    }
    assert contents.config.scale == 0.5
    write_contents(tmp_path / "file", contents)
    again = disha.load_adapter(copy.deepcopy(base), tmp_path / "file")
    assert again.complete
    write_lora(tmp_path / "straight", contents)
    write_lora(tmp_path / "through", read_contents(tmp_path / "file"))
    expected = tensors_of(tmp_path / "lora")
    assert "base_model.model.embed.lora_embedding_A" in expected
    for folder in ("straight", "through"):
        assert_same(tensors_of(tmp_path / folder), expected)


@pytest.mark.parametrize(("theirs", "ours"), [(None, 4), (4, None), (4, 5)])
def test_an_embedding_with_another_padding_row_is_refused(tmp_path, theirs, ours):
    lora.export(adapted(with_embedding(theirs), "embed", 2), tmp_path)
    with pytest.raises(AdapterFileError, match="padding_idx"):
        lora.load(with_embedding(ours), tmp_path)


def test_layers_of_fan_in_fan_out_are_told_by_the_base_only(tmp_path):
    base = gpt2().eval()
    ours = adapted(base, "c_attn|lm_head", 4, exclude="wte")
    lora.export(ours, tmp_path)
    with pytest.raises(disha.ConversionError, match="only the base tells the sizes"):
        read_folder(tmp_path)
    again = copy.deepcopy(base)
    assert lora.load(again, tmp_path).complete
    layouts = [
        {x.name: x.layout for x in adapter_contents(ModelView(m)).layers} for m in (again, ours)
    ]
    assert layouts[0] == layouts[1]
    assert len(set(layouts[0].values())) == 2


def normed():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).eval()
    base[1].running_mean.normal_()
    base[1].num_batches_tracked.fill_(3)
    return base


def with_trained_norm(folder):
    ours = adapted(normed(), "0", 4, also_train="1")
    with torch.no_grad():
        ours[1].weight.mul_(2)
    lora.export(ours, folder)
    return ours


def test_a_batch_norm_trained_beside_comes_back(tmp_path):
    ours, again = with_trained_norm(tmp_path), normed()
    report = lora.load(again, tmp_path)
    assert set(report.matched) == {"0.bone_block", "1.weight", "1.bias"}
    x = torch.randn(4, 8)
    assert torch.equal(again(x), ours(x))


def test_what_is_beside_the_factors_stays_behind_if_asked(tmp_path):
    ours, again = with_trained_norm(tmp_path), normed()
    assert lora.load(again, tmp_path, also_train=False).matched == ("0.bone_block",)
    assert torch.equal(again[0].disha["default"].block, ours[0].disha["default"].block)
    assert torch.equal(again[1].weight, normed()[1].weight)
    assert not again[1].weight.requires_grad


def test_statistics_of_a_folder_become_those_of_the_adapter(tmp_path):
    ours = with_trained_norm(tmp_path / "lora")
    other = normed()
    other[1].running_mean.add_(1)  # the folder has those of the norm that it was trained with
    assert "1.running_mean" in lora.load(other, tmp_path / "lora").matched
    x = torch.randn(4, 8)
    assert torch.equal(other(x), ours(x))
    write_contents(tmp_path / "file", read_folder(tmp_path / "lora"))
    again = normed()
    disha.load_adapter(again, tmp_path / "file")
    assert torch.equal(again(x), ours(x))


def test_what_peft_saves_again_comes_back(tmp_path):
    base = Layered().eval()
    ours = adapted(base, "q_proj|embed", 4, scale=0.5, also_train="norm")
    lora.export(ours, tmp_path / "ours")
    theirs = served(base, tmp_path / "ours")
    with torch.no_grad():
        theirs.base_model.model.layers[0]["attn"].q_proj.lora_B["default"].weight.mul_(2)
    theirs.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=True)
    again = copy.deepcopy(base)
    lora.load(again, tmp_path / "theirs")
    tokens = TOKENS % 12
    torch.testing.assert_close(output(again, tokens), output(theirs, tokens))


def test_peft_scales_by_patterns_and_roots(tmp_path):
    base = Layered().eval()
    lora.export(adapted(base, "_proj", 4), tmp_path)
    patterns = {"0.attn.q_proj": 5, ".*v_proj": 7, r"^layers\.1\.attn\.q_proj": 2, "(q|k)_proj$": 9}
    rewrite(tmp_path, lora_alpha=3, use_rslora=True, alpha_pattern=patterns)
    again = copy.deepcopy(base)
    lora.load(again, tmp_path)
    theirs = served(base, tmp_path)
    for name, layer in again.named_modules():
        if isinstance(layer, disha.AdaptedLayer):
            found = theirs.base_model.model.get_submodule(name)
            assert layer.disha["default"].scale == found.scaling["default"]
    torch.testing.assert_close(output(again, TOKENS % 12), output(theirs, TOKENS % 12))


def test_hot_swap_from_a_folder(tmp_path):
    base = Layered()
    ours = adapted(base, "q_proj", 4)
    lora.export(ours, tmp_path)
    other = adapted(base, "q_proj", 4)
    perturb(other, seed=1)
    blocks = list(disha.adapter_parameters(other))
    with pytest.raises(disha.ArgumentError, match="has an adapter 'default' already"):
        lora.load(other, tmp_path)
    lora.load(other, tmp_path, replace=True)
    assert [id(block) for block in disha.adapter_parameters(other)] == [id(b) for b in blocks]
    assert torch.equal(output(other, TOKENS % 12), output(ours, TOKENS % 12))


def test_a_setting_that_lacks_a_table_with_new_rows(tmp_path):
    lora.export(adapted(Layered(), "q_proj", 4, also_train_rows={"embed": [3]}), tmp_path)
    rewrite(tmp_path, trainable_token_indices={"other": [3]})
    model = Layered()
    with refused(model, AdapterFileError, "trainable_token_indices of embed must be a list"):
        lora.load(model, tmp_path)


A, B = (f"layers.0.attn.q_proj.lora_{one}.weight" for one in "AB")


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (with_fields(peft_type="LOKR"), ConversionError, "is of peft_type 'LOKR', not LORA"),
        (with_fields(use_dora=True), ConversionError, "uses use_dora"),
        (with_fields(bias="all"), ConversionError, "uses bias"),
        (
            with_fields(init_lora_weights="pissa_niter_4"),
            ConversionError,
            "uses init_lora_weights=pissa_niter_4",
        ),
        (with_fields(lora_alpha="8"), AdapterFileError, "can't be read: lora_alpha must be a num"),
        (with_fields(alpha_pattern={"[z-a]": 1}), AdapterFileError, "can't be read: bad character"),
        (with_fields(alpha_pattern=5), AdapterFileError, "can't be read: 'int' object"),
        (with_tensor(B, lambda t: None), AdapterFileError, "has no pair of factors, .*q_proj"),
        (with_tensor("other", lambda t: torch.ones(1)), AdapterFileError, "belongs to no layer"),
        (with_tensor(A, lambda t: torch.tensor(1.0)), AdapterFileError, "can't be read: len"),
        (with_tensor(B, lambda t: t / 0), AdapterFileError, "not finite"),
        (
            with_tensor(B, lambda t: torch.ones(7, 4)),
            AdapterFileError,
            r"has the shape \(8, 8\); the adapter is for \(7, 8\)",
        ),
    ],
)
def test_folders_that_are_refused(tmp_path, change, kind, message):
    lora.export(adapted(Layered(), "q_proj", 4), tmp_path)
    change(tmp_path)
    model = Layered()
    with refused(model, kind, message):
        lora.load(model, tmp_path)
