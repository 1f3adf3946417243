"""Adapters as LoRA: the real `peft` loads what is written and computes what the adapter does."""

import copy
from collections import OrderedDict
from dataclasses import FrozenInstanceError

import peft
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2TextScaledWordEmbedding

import disha
from disha.files import disk
from disha.files.contents import read_contents
from disha.files.saving import adapter_contents
from disha.interop import lora
from disha.interop import peft as miss
from disha.interop.lora import write_lora
from disha.layers.kinds import LAYER_KINDS
from disha.model.view import ModelView
from tests.conftest import InOut, Layered, assert_same, assert_unchanged, perturb, snapshot
from tests.functional.updates import bone_delta_weight
from tests.language_models import gpt2, llama
from tests.lora_folders import TOKENS, Vision, adapted, check_served, output, served
from tests.peft_models import (
    assert_same_folders,
    config_of,
    refused_export,
    tensors_of,
)
from tests.reference import METHODS


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float64, {"r": 3}),
        (torch.float32, {"r": 16}),
        (torch.float64, {"r_out": 4}),
        (torch.float64, {"groups": 2}),
        (torch.float64, {"groups": "all", "scale": 0.5}),
        (torch.float32, {"rank_pattern": {"q_proj": 2, r"1\.mlp": 8}}),
        (torch.float64, {"scale": -0.75}),
        (torch.float32, {"scale": 3e4 / 7, "rank_pattern": {"down": 5}}),
    ],
    ids=[
        "r4",
        "ragged",
        "wide",
        "tile",
        "groups",
        "all-groups",
        "ranks",
        "scale",
        "scale-and-ranks",
    ],
)
def test_llama_under_peft_computes_the_same(tmp_path, dtype, options):
    base = llama().eval().to(dtype)
    ours = adapted(base, **options)
    if options.get("scale", 1) > 1e3:
        for block in disha.adapter_parameters(ours):
            block.data.div_(1e3)
    report = lora.export(ours, tmp_path)
    assert report.error == 0
    check_served(base, tmp_path, ours, TOKENS, 1e-4 if dtype == torch.float32 else 1e-10)


def test_sixteen_bits_stay_sixteen_bits(tmp_path):
    base = llama().eval().to(torch.bfloat16)
    ours = adapted(base, dtype=torch.bfloat16)
    lora.export(ours, tmp_path)
    tensors = tensors_of(tmp_path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    theirs = served(base, tmp_path)
    change = output(ours, TOKENS) - output(base, TOKENS)
    assert (output(theirs, TOKENS) - output(ours, TOKENS)).norm() < 0.05 * change.norm()
    for name, layer in ours.named_modules():
        if isinstance(layer, disha.AdaptedLayer):
            found = theirs.base_model.model.get_submodule(name).get_delta_weight("default")
            block = layer.disha["default"].block
            expected = bone_delta_weight(block, layer.in_features, layer.out_features)
            assert torch.equal(found.to(torch.bfloat16), expected)


def test_blocks_of_another_dtype_than_the_weights_keep_it(tmp_path):
    ours = adapted(llama().eval().to(torch.bfloat16), dtype=torch.float32)
    lora.export(ours, tmp_path)
    tensors = tensors_of(tmp_path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_gpt2s_transposed_layers(tmp_path):
    base = gpt2().eval()
    ours = adapted(base, "attn|mlp", 5)
    lora.export(ours, tmp_path)
    assert config_of(tmp_path)["fan_in_fan_out"] is True
    check_served(base, tmp_path, ours, TOKENS, 1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_some_rows_of_a_weight(tmp_path, method):
    base = gpt2().eval()
    ours = adapted(base, "attn", 4, method=method, rows={"c_attn": [(0, 16), (32, 48)]})
    lora.export(ours, tmp_path, rank=16)
    check_served(base, tmp_path, ours, TOKENS, 1e-4)


def test_transposed_and_plain_layers_in_one_adapter(tmp_path):
    base = gpt2().eval()
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())
    base.config.tie_word_embeddings = False
    ours = adapted(base, "c_attn|lm_head", 4, method="bat")
    lora.export(ours, tmp_path, rank=20)
    check_served(base, tmp_path, ours, TOKENS, 1e-4)


@pytest.mark.parametrize("padding", [None, 3])
def test_embeddings(tmp_path, padding):
    base = Layered().eval()
    base.embed = nn.Embedding(12, 8, padding_idx=padding)
    ours = adapted(base, "embed|head|q_proj", 5)
    lora.export(ours, tmp_path)
    check_served(base, tmp_path, ours, TOKENS % 12, 1e-5)


def test_an_embedding_tied_to_the_head(tmp_path):
    base = llama(tie_word_embeddings=True).eval()
    ours = adapted(base, "embed_tokens|q_proj", 4, exclude="lm_head")
    lora.export(ours, tmp_path)
    theirs = served(base, tmp_path)
    torch.testing.assert_close(output(theirs, TOKENS), output(ours, TOKENS), atol=1e-5, rtol=1e-5)


def test_convolutions(tmp_path):
    base = Vision().eval()
    ours = adapted(base, "plane|line|space|point", 3, rank_pattern={"space": 1, "point": 2})
    report = lora.export(ours, tmp_path)
    ranks = {layer.name: layer.rank for layer in report.layers}
    assert ranks == {"plane": 18, "line": 9, "space": 8, "point": 2}
    check_served(base, tmp_path, ours, torch.randn(2, 5, 9, 7), 1e-4)


def test_convolution_of_a_tile_cut_to_a_rank(tmp_path):
    base = nn.Sequential(nn.Conv2d(6, 8, 3))
    ours = adapted(base, "0", 3, r_out=4)
    report = lora.export(ours, tmp_path, rank=36)
    check_served(base, tmp_path, ours, torch.randn(2, 6, 5, 5), 1e-4)
    report = lora.export(ours, tmp_path, rank=2)
    delta = ours[0].delta_weight(ours[0].disha["default"]).detach()
    found = served(base, tmp_path).base_model.model[0].get_delta_weight("default")
    expected = torch.linalg.norm(found - delta) / torch.linalg.norm(delta)
    singular = torch.linalg.svdvals(delta.flatten(1).double())
    assert report.error == pytest.approx(expected.item(), rel=1e-4)
    assert report.error == pytest.approx((singular[2:].norm() / singular.norm()).item(), rel=1e-4)


def test_only_the_adapted_layers_are_targeted(tmp_path):
    """PEFT matches the ends of names: here `q_proj` is the end of another one."""
    inner = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
    base = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "inner": inner})
    ours = adapted(base, "^q_proj$")
    lora.export(ours, tmp_path)
    theirs = served(base, tmp_path).base_model.model
    assert isinstance(theirs["q_proj"], peft.tuners.lora.Linear)
    assert type(theirs["inner"]["q_proj"]) is nn.Linear


def test_names_that_end_alike_keep_their_own_ranks_and_scales(tmp_path):
    base = nn.ModuleDict({"b": nn.Linear(8, 8), "a": nn.ModuleDict({"b": nn.Linear(8, 8)})})
    ours = adapted(base, "b", 4, rank_pattern={"^b": 2})
    ours["b"].disha["default"].scale = 0.5
    lora.export(ours, tmp_path)
    theirs = served(base, tmp_path).base_model.model
    assert (theirs["b"].r["default"], theirs["b"].scaling["default"]) == (2, 0.5)
    assert (theirs["a"]["b"].r["default"], theirs["a"]["b"].scaling["default"]) == (4, 1.0)


def test_an_adapter_of_scale_zero_stays_without_effect(tmp_path):
    base = nn.Sequential(nn.Linear(8, 8))
    ours = adapted(base, "0", 4, scale=0.0)
    lora.export(ours, tmp_path)
    assert config_of(tmp_path)["lora_alpha"] == 4
    x = torch.randn(3, 8)
    assert torch.equal(served(base, tmp_path)(x), base(x))


def test_dropout_is_passed_on(tmp_path):
    lora.export(adapted(Layered(), "q_proj", 4, dropout=0.25), tmp_path)
    theirs = peft.PeftModel.from_pretrained(Layered(), str(tmp_path), is_trainable=True)
    layer = theirs.base_model.model.layers[0]["attn"].q_proj
    assert layer.lora_dropout["default"].p == 0.25


def test_a_merged_adapter_is_exported_from_the_original_weights(tmp_path):
    ours = adapted(llama().eval(), method="bat", r=4)
    lora.export(ours, tmp_path / "before", rank=6)
    disha.merge_adapters(ours)
    lora.export(ours, tmp_path / "after", rank=6)
    assert_same_folders(tmp_path / "before", tmp_path / "after")


def test_a_quantized_base(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = nn.Sequential(bitsandbytes.nn.Linear8bitLt(16, 8, has_fp16_weights=False)).to("cpu")
    ours = perturb(disha.inject_adapters(base, "0", 4))
    report = lora.export(ours, tmp_path)
    assert report.error == 0


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("LlamaForCausalLM", "CAUSAL_LM"),
        ("GPT2LMHeadModel", "CAUSAL_LM"),
        ("LlamaModel", None),
        ("LlamaForSequenceClassification", None),
    ],
)
def test_the_task_and_the_name_of_the_base_are_written(tmp_path, architecture, task):
    """No task that classifies, because PEFT would expect the whole head in the folder."""
    cls = LlamaForCausalLM if task else LlamaForSequenceClassification
    base = type(architecture, (cls,), {})(llama().config).eval()
    base.config.architectures = ["LlamaForCausalLM"]  # as `from_pretrained` leaves it
    base.config._name_or_path = "someone/tiny-llama"
    ours = adapted(base, "q_proj|score")
    lora.export(ours, tmp_path / "lora")
    miss.export(ours, tmp_path / "miss")
    for folder in ("lora", "miss"):
        found = peft.PeftConfig.from_pretrained(tmp_path / folder)
        assert found.base_model_name_or_path == "someone/tiny-llama"
        assert found.task_type == task
    theirs = served(base, tmp_path / "lora")
    assert isinstance(theirs, peft.PeftModelForCausalLM) == (task is not None)
    torch.testing.assert_close(output(theirs, TOKENS[1:]), output(ours, TOKENS[1:]))


def test_modules_trained_beside_the_blocks(tmp_path):
    base = Layered().eval()
    ours = adapted(base, "q_proj", 4, also_train=r"norm\.weight|head")
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "norm.weight" in name or "head" in name:
                parameter.add_(torch.randn_like(parameter))
    report = lora.export(ours, tmp_path)
    # PEFT saves modules whole: the biases of the norms come along.
    assert "layers.0.attn.norm.bias" in report.also_train
    check_served(base, tmp_path, ours, TOKENS % 12, 1e-5)


@pytest.fixture
def _in_out(monkeypatch):
    monkeypatch.setattr("disha.layers.kinds.LAYER_KINDS", dict(LAYER_KINDS))
    disha.register_layer_kind(InOut, {"weight": "in out"})


@pytest.mark.usefixtures("_in_out")
@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv2d(8, 8, 3, groups=2), "groups=2"),
        (nn.Conv2d(8, 8, 3, dilation=2), "is dilated"),
        (nn.Conv1d(8, 8, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (nn.ConvTranspose1d(8, 8, 3), "does not know a ConvTranspose1d"),
        (nn.Embedding(8, 8, max_norm=0.5), "has max_norm"),
        (T5Gemma2TextScaledWordEmbedding(8, 8, 0, eoi_token_index=5), "a forward of its own"),
        (InOut(6, 6), "does not know a InOut"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "its weight is computed"),
    ],
)
def test_layers_that_peft_has_no_lora_for(tmp_path, layer, message):
    ours = adapted(nn.Sequential(layer), "0", 2)
    with refused_export(tmp_path, ours, message):
        lora.export(ours, tmp_path / "lora")


def test_the_model_itself_is_refused(tmp_path):
    ours = adapted(nn.Linear(8, 8))
    with refused_export(tmp_path, ours, "not the model itself"):
        write_lora(tmp_path / "lora", adapter_contents(ModelView(ours)))


@pytest.mark.parametrize(
    "options",
    [
        {"also_train": "norm", "r": 1},
        {"also_train_rows": {"embed_tokens": [3]}},
        {"method": "bat"},
    ],
    ids=str,
)
def test_in_memory_it_is_what_the_files_hold_and_peft_takes_it(tmp_path, options):
    rank = 5 if "method" in options else None
    base = llama().eval()
    model = adapted(base, **options)
    lora.export(model, tmp_path, rank=rank)
    tensors, config = lora.export_tensors(model, rank=rank)
    assert config == config_of(tmp_path)
    assert_same(tensors, tensors_of(tmp_path))

    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig.from_peft_type(**config))
    report = peft.set_peft_model_state_dict(theirs, tensors)
    assert not report.unexpected_keys
    filed = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(output(theirs, TOKENS), output(filed, TOKENS))
    before = snapshot(model)
    for tensor in tensors.values():
        tensor.zero_()  # shares no memory with the model
    assert_unchanged(model, before)


def test_experts_that_are_modules_of_a_list(tmp_path):
    experts = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8)) for _ in range(2)])
    base = nn.Sequential(OrderedDict(experts=experts))
    ours, loaded = adapted(base, "all-linear", 2), copy.deepcopy(base)
    lora.export(ours, tmp_path)
    check_served(base, tmp_path, ours, torch.randn(3, 8), 1e-5)
    lora.load(loaded, tmp_path)
    assert disha.summary(loaded).layers == disha.summary(ours).layers


def test_a_wrapped_model_has_the_notes_of_the_model_in_it(tmp_path):
    base = llama()
    base.config._name_or_path = "someone/tiny-llama"
    ours = adapted(base, "q_proj")
    lora.export(ours, tmp_path / "ours")
    for number, wrapped in enumerate([torch.compile(ours), AveragedModel(ours)]):
        lora.export(wrapped, tmp_path / f"lora{number}")
        assert_same_folders(tmp_path / f"lora{number}", tmp_path / "ours")
        miss.export(wrapped, tmp_path / f"miss{number}")
        assert config_of(tmp_path / f"miss{number}")["task_type"] == "CAUSAL_LM"


def test_new_rows_alone(tmp_path):
    base = llama().eval()
    trained = adapted(base, "q_proj", also_train_rows={"embed_tokens": [3, 5]})
    disha.save_adapter(trained, tmp_path / "adapter")
    ours, loaded = copy.deepcopy(base), copy.deepcopy(base)
    disha.load_adapter(ours, tmp_path / "adapter", layers="embed_tokens")
    report = lora.export(ours, tmp_path / "lora", pad=True)
    assert report.error == 0
    assert "also trained: model.embed_tokens.token_adapter" in str(report)
    check_served(base, tmp_path / "lora", ours, TOKENS, 1e-5)
    lora.load(loaded, tmp_path / "lora")
    assert torch.equal(output(loaded, TOKENS), output(ours, TOKENS))


def test_the_report_is_frozen(tmp_path):
    report = lora.export(adapted(Layered(), "q_proj", 4), tmp_path)
    with pytest.raises(FrozenInstanceError):
        report.error = 1.0
    assert str(report).splitlines() == [
        "layer                 method  r  rank  error",
        "layers.0.attn.q_proj  bone    4     4  exact",
        "layers.1.attn.q_proj  bone    4     4  exact",
        f"{tmp_path}: 2 layers, largest error exact",
    ]


def test_values_that_are_not_finite_are_refused(tmp_path):
    ours = adapted(Layered(), "q_proj", 4)
    with torch.no_grad():
        disha.adapter_parameters(ours)[0][0, 0] = float("nan")
    with refused_export(tmp_path, ours, "not finite", kind=disha.AdapterStateError):
        lora.export(ours, tmp_path / "lora")


def test_a_failed_write_leaves_the_old_folder(tmp_path, monkeypatch):
    ours = adapted(Layered(), "q_proj", 4)
    lora.export(ours, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    perturb(ours, seed=1)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "save_file", fail)
    with pytest.raises(disha.AdapterIOError, match="No space left"):
        lora.export(ours, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("method", METHODS)
def test_a_file_becomes_the_same_folder(tmp_path, method):
    base = llama().eval()
    ours = adapted(base, method=method, also_train="norm")
    lora.export(ours, tmp_path / "model", rank=4)
    disha.save_adapter(ours, tmp_path / "adapter.safetensors")
    contents = read_contents(tmp_path / "adapter.safetensors")
    state = base.state_dict()
    report = write_lora(
        tmp_path / "file", contents, rank=4, base=lambda name: state[f"{name}.weight"]
    )
    name = "adapter_model.safetensors"
    assert (tmp_path / "file" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    found, expected = (config_of(tmp_path / folder) for folder in ("file", "model"))
    assert found["target_modules"] == sorted(layer.name for layer in report.layers)
    assert found == {**expected, "task_type": None}  # the model tells its task


def test_away_from_the_model_bat_needs_the_base(tmp_path):
    ours = adapted(Layered(), "q_proj", 4, method="bat")
    contents = adapter_contents(ModelView(ours))
    with refused_export(tmp_path, ours, "give `base`", kind=disha.ArgumentError):
        write_lora(tmp_path / "lora", contents, rank=4)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv1d(8, 8, 3), "is a convolution"),
        (nn.ConvTranspose1d(8, 8, 3), "LoRA can't express 1 of 1 layer"),
        (nn.Bilinear(8, 8, 3), "LoRA can't express 1 of 1 layer"),
    ],
)
def test_away_from_the_model_some_layers_are_refused(tmp_path, layer, message):
    ours = adapted(nn.Sequential(layer), "0", 2)
    with refused_export(tmp_path, ours, message):
        write_lora(tmp_path / "lora", adapter_contents(ModelView(ours)))


def test_away_from_the_model_a_layer_whose_bias_trains_is_refused(tmp_path):
    ours = disha.inject_adapters(nn.Sequential(nn.Linear(8, 8)), "0", 2, also_train="bias")
    with refused_export(tmp_path, ours, "0: PEFT would not adapt it"):
        write_lora(tmp_path / "lora", adapter_contents(ModelView(ours)))
