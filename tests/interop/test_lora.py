"""Adapters as LoRA: the real `peft` loads what is written and computes what the adapter does."""

import copy
import warnings
from collections import OrderedDict
from dataclasses import FrozenInstanceError, replace

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2TextScaledWordEmbedding

import disha
from disha import AdapterFileError, ArgumentTypeError, ConversionError
from disha.files import disk
from disha.files.contents import adapter_contents, read_contents, write_contents
from disha.functional import Layout, bat_delta_weight, bone_delta_weight
from disha.interop import lora, low_rank
from disha.interop import peft as miss
from disha.layers.kinds import LAYER_KINDS
from disha.model.view import ModelView
from tests.conftest import InOut, Layered, assert_same, assert_unchanged, perturb, refused, snapshot
from tests.language_models import gpt2, llama
from tests.peft_models import (
    assert_same_folders,
    config_of,
    refused_export,
    rewrite,
    tensors_of,
    with_fields,
    with_tensor,
)

TOKENS = torch.arange(12).view(2, 6)


class Vision(nn.Module):
    """One convolution of each dimension, with strides, paddings and a kernel that is not square."""

    def __init__(self):
        super().__init__()
        self.plane = nn.Conv2d(5, 6, (3, 2), stride=2, padding=(1, 0))
        self.line = nn.Conv1d(6, 4, 3, padding="same", bias=False)
        self.space = nn.Conv3d(1, 3, 2)
        self.point = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.line(self.plane(x).flatten(2))
        x = self.point(x[:, :, None]).transpose(1, 2).unsqueeze(-1)
        return self.space(x.expand(-1, -1, -1, -1, 3))


def served(base, folder):
    """Load a folder with peft; every parameter of its layers must come from the file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*missing adapter keys.*")
        warnings.filterwarnings("ignore", ".*fan_in_fan_out.*")
        warnings.filterwarnings("ignore", ".*tied.*")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    kept = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert kept.keys() == tensors_of(folder).keys()
    return model


def output(model, inputs):
    found = model(inputs)
    return found.logits if hasattr(found, "logits") else found


def check_served(base, folder, ours, inputs, tolerance):
    """Compare outputs with peft's, and weights after merging on both sides."""
    theirs = served(base, folder)
    with torch.no_grad():
        expected, found = output(ours, inputs), output(theirs, inputs)
        assert not torch.allclose(expected, output(base, inputs), atol=1e-3)
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    disha.merge_adapters(ours, "default")
    merged = theirs.merge_and_unload().state_dict()
    for name, weight in ours.state_dict().items():
        if ".disha." not in name:
            torch.testing.assert_close(
                merged[name], weight, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: n + m
            )
    disha.unmerge_adapters(ours)


def adapted(base, target="all-linear", r=4, **options):
    return perturb(disha.inject_adapters(copy.deepcopy(base), target, r, **options))


# --- peft computes the same ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float64, {"r": 3}),
        (torch.float32, {"r": 16}),
        (torch.float64, {"r_out": 4}),
        (torch.float32, {"rank_pattern": {"q_proj": 2, r"1\.mlp": 8}}),
        (torch.float64, {"scale": -0.75}),
        (torch.float32, {"scale": 3e4 / 7, "rank_pattern": {"down": 5}}),
    ],
    ids=["r4", "ragged", "wide", "tile", "ranks", "scale", "scale-and-ranks"],
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


@pytest.mark.parametrize("method", ["bone", "bat"])
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
    ours["b"].disha["default"].set_scale(0.5)
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


# --- what was trained beside ---------------------------------------------------------------------


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


# --- where peft would do something else ----------------------------------------------------------


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
        lora.write_lora(tmp_path / "lora", adapter_contents(ModelView(ours)))


# --- cut to a rank -------------------------------------------------------------------------------


def dense(layer):
    """dW (out, in) of a linear layer, in float64."""
    block = layer.disha["default"]
    if block.method.name == "bat":
        return bat_delta_weight(layer.base_weight.detach().double(), block.block.detach().double())
    return bone_delta_weight(block.block.detach(), layer.in_features, layer.out_features).double()


@pytest.mark.parametrize(("method", "rank"), [("bat", 1), ("bat", 5), ("bone", 1), ("bone", 3)])
def test_the_cut_is_the_best_one_and_its_error_is_reported(tmp_path, method, rank):
    base = Layered().double()
    ours = adapted(base, "_proj", 4, method=method, scale=2.0)
    report = lora.export(ours, tmp_path, rank=rank)
    theirs = served(base, tmp_path).base_model.model
    for layer in report.layers:
        delta = 2 * dense(ours.get_submodule(layer.name))
        rest = delta - theirs.get_submodule(layer.name).get_delta_weight("default").detach()
        singular = torch.linalg.svdvals(delta)
        assert layer.rank == rank
        assert layer.error == pytest.approx((rest.norm() / delta.norm()).item(), rel=1e-6)
        assert layer.error == pytest.approx(
            (singular[rank:].norm() / singular.norm()).item(), rel=1e-6
        )
    assert 0.01 < report.error == max(layer.error for layer in report.layers)
    assert f"largest error {report.error:.3g}" in str(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bat_at_full_rank_is_exact_to_rounding(tmp_path, dtype):
    base = llama().eval().to(dtype)
    ours = adapted(base, method="bat", r=5)
    report = lora.export(ours, tmp_path, rank=64)
    assert report.error < (1e-5 if dtype == torch.float32 else 1e-12)
    check_served(base, tmp_path, ours, TOKENS, 1e-3 if dtype == torch.float32 else 1e-10)


def test_errors_count_the_rounding_to_sixteen_bits(tmp_path):
    ours = adapted(llama().eval().to(torch.bfloat16), method="bat", dtype=torch.bfloat16)
    assert 1e-4 < lora.export(ours, tmp_path, rank=64).error < 1e-2


def test_leading_singular_values_of_large_layers(tmp_path, monkeypatch):
    """Beyond some size only these are computed; little is lost by it, and every time the same."""
    ours = adapted(nn.Sequential(nn.Linear(300, 200)), "0", 8, method="bat")
    exact = lora.export(ours, tmp_path / "exact", rank=16).error
    monkeypatch.setattr(low_rank, "LARGEST_EXACT", 100)
    state, seeded = torch.random.get_rng_state(), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    near = lora.export(ours, tmp_path / "near", rank=16)
    again = lora.export(ours, tmp_path / "again", rank=16)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not seeded  # a training on a GPU goes on with its own random numbers
    assert exact < near.error < 1.01 * exact
    assert near.layers == again.layers


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({}, disha.ArgumentError, "give `rank`"),
        ({"rank": 0}, disha.ArgumentError, "rank must be at least 1, got 0"),
        ({"rank": 2.0}, ArgumentTypeError, "rank must be an int"),
        ({"rank": True}, ArgumentTypeError, "rank must be an int"),
        ({"rank": 2, "adapter": "other"}, disha.ArgumentError, "no adapter 'other'"),
    ],
)
def test_arguments(tmp_path, options, kind, message):
    ours = adapted(Layered(), "_proj", 4, method="bat")
    with refused_export(tmp_path, ours, message, kind=kind):
        lora.export(ours, tmp_path / "lora", **options)


@pytest.mark.parametrize("options", [{"also_train": "norm", "r": 1}, {"method": "bat"}], ids=str)
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


# --- away from the model -------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bone", "bat"])
def test_a_file_becomes_the_same_folder(tmp_path, method):
    base = llama().eval()
    ours = adapted(base, method=method, also_train="norm")
    lora.export(ours, tmp_path / "model", rank=4)
    disha.save_adapter(ours, tmp_path / "adapter.safetensors")
    contents = read_contents(tmp_path / "adapter.safetensors")
    state = base.state_dict()
    report = lora.write_lora(
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
        lora.write_lora(tmp_path / "lora", contents, rank=4)
    with refused_export(tmp_path, ours, "the weight has the shape", kind=disha.AdapterFileError):
        lora.write_lora(tmp_path / "lora", contents, rank=4, base=lambda _: torch.ones(3, 8))


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
        lora.write_lora(tmp_path / "lora", adapter_contents(ModelView(ours)))


def test_away_from_the_model_a_layer_whose_bias_trains_is_refused(tmp_path):
    ours = disha.inject_adapters(nn.Sequential(nn.Linear(8, 8)), "0", 2, also_train="bias")
    with refused_export(tmp_path, ours, "0: PEFT would not adapt it"):
        lora.write_lora(tmp_path / "lora", adapter_contents(ModelView(ours)))


# --- and back ------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("r", "padded"), [(4, 8), (8, 8), (18, 32), (40, 64)])
def test_padded_ranks_are_those_that_servers_allow(tmp_path, r, padded):
    base = nn.Sequential(nn.Linear(48, 40), nn.Embedding(48, 40), nn.Conv2d(48, 40, 1))
    ours = adapted(base, "0|1|2", r, scale=0.3)
    report = lora.export(ours, tmp_path, pad=True)
    assert {layer.rank for layer in report.layers} == {padded}
    assert report.error == 0
    theirs = served(copy.deepcopy(base), tmp_path).base_model.model
    x = torch.randn(3, 48)
    torch.testing.assert_close(theirs[0](x), ours[0](x))
    again = copy.deepcopy(base)
    lora.load(again, tmp_path)
    for name in "012":
        found, expected = (one.get_submodule(name).disha["default"] for one in (again, ours))
        assert (found.r, torch.equal(found.block, expected.block)) == (r, True)
        assert found.scale == pytest.approx(0.3)


def test_ranks_beyond_those_of_servers_are_not_padded(tmp_path):
    ours = adapted(nn.Sequential(nn.Linear(600, 4)), "0", 513)
    with refused_export(tmp_path, ours, "ranks are padded to at most 512"):
        lora.export(ours, tmp_path / "lora", pad=True)
    assert lora.export(ours, tmp_path / "lora").layers[0].rank == 513


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
    contents = lora.read_lora(tmp_path / "lora")
    assert {layer.name: layer.layout for layer in contents.layers} == {
        "embed": Layout("index out", padding_idx=padding),
        "linear": Layout("out in"),
    }
    assert contents.config.scale == 0.5
    write_contents(tmp_path / "file", contents)
    again = disha.load_adapter(copy.deepcopy(base), tmp_path / "file")
    assert again.complete
    lora.write_lora(tmp_path / "straight", contents)
    lora.write_lora(tmp_path / "through", read_contents(tmp_path / "file"))
    expected = tensors_of(tmp_path / "lora")
    assert "base_model.model.embed.lora_embedding_A" in expected
    for folder in ("straight", "through"):
        assert_same(tensors_of(tmp_path / folder), expected)


@pytest.mark.parametrize(("theirs", "ours"), [(None, 4), (4, None), (4, 5)])
def test_an_embedding_with_another_padding_row_is_refused(tmp_path, theirs, ours):
    lora.export(adapted(with_embedding(theirs), "embed", 2), tmp_path)
    with pytest.raises(AdapterFileError, match="padding_idx"):
        lora.load(with_embedding(ours), tmp_path)


def test_layers_of_fan_in_fan_out_are_told_by_the_model_only(tmp_path):
    base = gpt2().eval()
    ours = adapted(base, "c_attn|lm_head", 4, exclude="wte")
    lora.export(ours, tmp_path)
    with pytest.raises(disha.ConversionError, match="fan_in_fan_out"):
        lora.read_lora(tmp_path)
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
    contents = lora.read_lora(tmp_path, also_train=False)
    assert (contents.also_train, contents.config.also_train) == ((), ())
    assert list(contents.tensors) == ["0.bone_block"]


def test_statistics_of_a_folder_become_those_of_the_adapter(tmp_path):
    ours = with_trained_norm(tmp_path / "lora")
    other = normed()
    other[1].running_mean.add_(1)  # the folder has those of the norm that it was trained with
    assert "1.running_mean" in lora.load(other, tmp_path / "lora").matched
    x = torch.randn(4, 8)
    assert torch.equal(other(x), ours(x))
    write_contents(tmp_path / "file", lora.read_lora(tmp_path / "lora"))
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


def test_a_trained_lora_is_no_bone_adapter(tmp_path):
    theirs = peft.get_peft_model(Layered(), peft.LoraConfig(target_modules=["q_proj"], r=4))
    theirs.save_pretrained(str(tmp_path))
    model = Layered()
    with refused(model, disha.ConversionError, r"in 2 of 2 layers"):
        lora.load(model, tmp_path)


A, B = (f"layers.0.attn.q_proj.lora_{one}.weight" for one in "AB")


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (with_fields(peft_type="MISS"), AdapterFileError, "not 'LORA'"),
        (with_fields(use_dora=True), ConversionError, "uses use_dora"),
        (with_fields(bias="all"), ConversionError, "uses bias"),
        (
            with_fields(init_lora_weights="pissa_niter_4"),
            ConversionError,
            "uses init_lora_weights=pissa_niter_4",
        ),
        (with_fields(lora_alpha="8"), AdapterFileError, "lora_alpha: .* must be a number"),
        (with_fields(alpha_pattern={"(.+)+": 1}), AdapterFileError, "of alpha_pattern is too long"),
        (with_fields(alpha_pattern=5), ArgumentTypeError, "alpha_pattern must be a JSON object"),
        (with_tensor(B, lambda t: None), AdapterFileError, "has no pair of factors, .*q_proj"),
        (with_tensor("other", lambda t: torch.ones(1)), AdapterFileError, "is neither lora_A nor"),
        (with_tensor(A, lambda t: torch.tensor(1.0)), ConversionError, "is not a Bone adapter"),
        (with_tensor(B, lambda t: t / 0), AdapterFileError, "not finite"),
        (with_tensor(B, lambda t: torch.ones(7, 4)), AdapterFileError, "8 -> 7, found 8 -> 8"),
    ],
)
def test_folders_that_are_refused(tmp_path, change, kind, message):
    lora.export(adapted(Layered(), "q_proj", 4), tmp_path)
    change(tmp_path)
    model = Layered()
    with refused(model, kind, message):
        lora.load(model, tmp_path)
