"""Experts as LoRA: stacked, as the real `peft` computes with them, and separate, as servers do.

`python -m tests.runtimes` shows the separate form to the code of vLLM and SGLang; the tables of
names and shapes here are those that it has accepted.
"""

import copy
import dataclasses
import warnings

import peft
import pytest
import torch
from torch import nn

import disha
from disha.cli import main
from disha.files.saving import adapter_contents
from disha.functional import Layout
from disha.interop import lora
from disha.interop.checkpoints import merge_into_checkpoint
from disha.interop.lora import write_lora
from disha.model.view import ModelView
from tests.base_checkpoints import tensors_in
from tests.conftest import assert_same, perturb, refused
from tests.language_models import llama
from tests.peft_models import config_of, refused_export, rewrite, tensors_of
from tests.whole.test_experts import EXPERTS, INNER, VOCABULARY, WIDTH, build

ONLY_EXPERTS = r"\bexperts\.(gate_up|down)_proj$"
WITH_ATTENTION = r"self_attn\.(q|k|v|o)_proj$|" + ONLY_EXPERTS
TOKENS = torch.arange(24).view(2, 12) % VOCABULARY

STACKED = ("Mixtral", "Qwen3-MoE", "GPT-OSS", "DeepSeek-V3", "OLMoE")
SEPARATE = ("Mixtral", "Qwen3-MoE", "GPT-OSS")


def adapted(base, target=WITH_ATTENTION, r=3, **options):
    return perturb(disha.inject_adapters(copy.deepcopy(base), target, r, **options), size=0.2)


def check_in_peft(base, folder, ours):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*missing adapter keys.*")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    with torch.no_grad():
        expected, plain = ours(TOKENS).logits, base(TOKENS).logits
        assert not torch.allclose(expected, plain, atol=1e-1)
        torch.testing.assert_close(theirs(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)
    return theirs


def check_same_adapter(base, folder, ours):
    again = copy.deepcopy(base)
    lora.load(again, folder)
    expected, found = (adapter_contents(ModelView(one)) for one in (ours, again))
    by_name = {layer.name: layer for layer in found.layers}
    assert_same(found.tensors, expected.tensors)
    for layer in expected.layers:
        other = by_name[layer.name]
        assert (other.layout, other.r, other.method) == (layer.layout, layer.r, layer.method)
        assert other.scale == pytest.approx(layer.scale)


# --- stacked: PEFT's target_parameters -----------------------------------------------------------


@pytest.mark.parametrize("name", STACKED)
def test_peft_computes_with_stacks_what_the_adapter_does(tmp_path, name):
    base = build(name, "eager")
    ours = adapted(base, ONLY_EXPERTS, rank_pattern={"down": 5}, scale=0.5)
    report = lora.export(ours, tmp_path)
    assert report.error == 0
    assert {layer.rank for layer in report.layers} == {3, 5}
    check_in_peft(base, tmp_path, ours)
    check_same_adapter(base, tmp_path, ours)


def test_what_peft_trains_further_comes_back(tmp_path):
    base = build("Mixtral", "eager")
    ours = adapted(base)
    lora.export(ours, tmp_path / "ours")
    theirs = check_in_peft(base, tmp_path / "ours", ours)
    theirs.save_pretrained(tmp_path / "theirs")
    check_same_adapter(base, tmp_path / "theirs", ours)
    with torch.no_grad():
        for key, factor in theirs.named_parameters():
            if "experts.base_layer.lora_A" in key:
                factor[0, 0] += 1  # one value of the first expert
    theirs.save_pretrained(tmp_path / "other")
    again = copy.deepcopy(base)
    lora.load(again, tmp_path / "other")
    assert {layer.method for layer in disha.summary(again).layers} == {"lora"}
    check_in_peft(base, tmp_path / "other", again)


@pytest.mark.parametrize("last", ["gate_up_proj", "down_proj"])
def test_one_stack_of_a_layer_alone(tmp_path, last):
    base = build("Qwen3-MoE", "eager")
    ours = adapted(base, rf"experts\.{last}$")
    lora.export(ours, tmp_path)
    names = [f"model.layers.{n}.mlp.experts.{last}" for n in range(len(base.model.layers))]
    assert config_of(tmp_path)["target_parameters"] == names
    assert "base_model.model.model.layers.0.mlp.experts.lora_A.weight" in tensors_of(tmp_path)
    check_in_peft(base, tmp_path, ours)
    check_same_adapter(base, tmp_path, ours)


def test_stacks_have_the_names_that_vllm_reads_for_gpt_oss(tmp_path):
    ours = adapted(build("GPT-OSS", "eager"), ONLY_EXPERTS)
    lora.export(ours, tmp_path, pad=True)
    owner = "base_model.model.model.layers.0.mlp.experts"
    assert {key: tuple(one.shape) for key, one in tensors_of(tmp_path).items()} == {
        f"{owner}.base_layer.lora_A.weight": (8 * EXPERTS, WIDTH),
        f"{owner}.base_layer.lora_B.weight": (2 * INNER, 8 * EXPERTS),
        f"{owner}.lora_A.weight": (8 * EXPERTS, INNER),
        f"{owner}.lora_B.weight": (WIDTH, 8 * EXPERTS),
    }


def test_some_layers_only(tmp_path):
    base = build("Mixtral", "eager", num_hidden_layers=2)
    ours = adapted(base, r"layers\.1\.mlp\.experts\.|layers\.0\.self_attn\.q_proj")
    lora.export(ours, tmp_path)
    owner = "model.layers.1.mlp.experts"
    names = [f"{owner}.down_proj", f"{owner}.gate_up_proj"]
    assert config_of(tmp_path)["target_parameters"] == names
    check_in_peft(base, tmp_path, ours)


def test_peft_has_no_dropout_for_experts(tmp_path):
    base = build("Mixtral", "eager")
    ours = adapted(base, dropout=0.1)
    lora.export(ours, tmp_path)
    assert config_of(tmp_path)["lora_dropout"] == 0
    check_in_peft(base, tmp_path, ours)


def test_modules_that_peft_takes_for_experts_are_refused(tmp_path):
    """PEFT silently computed something else for the shared experts of such models."""
    base = build("DeepSeek-V3", "eager")
    ours = adapted(base, "shared_experts|" + ONLY_EXPERTS)
    taken = r"shared_experts\.up_proj: PEFT takes a target"
    with pytest.raises(disha.ConversionError, match=taken):
        lora.export(ours, tmp_path / "lora")
    with pytest.raises(disha.ConversionError, match=taken):
        write_lora(tmp_path / "lora", adapter_contents(ModelView(ours)))
    assert lora.export(ours, tmp_path / "lora", experts="separate").error == 0


def test_stacks_whose_axes_peft_would_mistake_are_refused(tmp_path):
    ours = adapted(build("Llama-4", "eager"), ONLY_EXPERTS)
    with refused_export(tmp_path, ours, "take its inputs for its outputs"):
        lora.export(ours, tmp_path / "lora")


# --- separate: the names of vLLM and SGLang ------------------------------------------------------

BLOCKS = {"Mixtral": "block_sparse_moe", "Qwen3-MoE": "mlp", "GPT-OSS": "mlp"}
PROJECTIONS = {"gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER)}
DENSE = ((24, 16), (24, 16), (16, 24))
OLD_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def accepted(name, rank):
    """Names and shapes of the factors of experts that the code of vLLM and SGLang has taken."""
    table = {}
    for expert in range(EXPERTS):
        for projection, (out, inputs) in PROJECTIONS.items():
            last = OLD_NAMES[projection] if name == "Mixtral" else projection
            key = f"base_model.model.model.layers.0.{BLOCKS[name]}.experts.{expert}.{last}"
            table[f"{key}.lora_A.weight"] = (rank, inputs)
            table[f"{key}.lora_B.weight"] = (out, rank)
    return table


@pytest.mark.parametrize("name", SEPARATE)
def test_separate_experts_have_the_names_that_servers_read(tmp_path, name):
    base = build(name, "eager")
    ours = adapted(base, rank_pattern={"down": 5}, scale=0.5)
    lora.export(ours, tmp_path, experts="separate", pad=True)
    tensors, config = tensors_of(tmp_path), config_of(tmp_path)
    shapes = {key: tuple(one.shape) for key, one in tensors.items() if ".experts." in key}
    assert shapes == accepted(name, 8)
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (8, 4, {})
    assert "target_parameters" not in config
    ends = {one.rpartition(".")[2] for one in config["target_modules"]}
    assert ends == {"q_proj", "k_proj", "v_proj", "o_proj", *PROJECTIONS}  # what SGLang knows
    with refused(base, disha.AdapterFileError, "the model has no such layer"):
        lora.load(base, tmp_path)
    if name == "GPT-OSS":
        return
    # PEFT reads such keys too, from before transformers stacked experts, under the names of then.
    old = OLD_NAMES if name == "Mixtral" else {}
    rewrite(tmp_path, target_modules=[old.get(one, one) for one in config["target_modules"]])
    check_in_peft(base, tmp_path, ours)


@pytest.mark.parametrize("name", SEPARATE)
def test_gate_and_up_get_their_own_rows(tmp_path, name):
    """In GPT-OSS they take turns in the stack; in all others, gate is the first half."""
    ours = adapted(build(name, "eager"), ONLY_EXPERTS)
    lora.export(ours, tmp_path, experts="separate")
    experts = ours.model.layers[0].mlp.experts
    delta = experts.delta_weight(experts.disha["default"].gate_up_proj)
    delta = delta.mT if name == "GPT-OSS" else delta
    halves = (delta[:, ::2], delta[:, 1::2]) if name == "GPT-OSS" else delta.chunk(2, dim=1)
    tensors = tensors_of(tmp_path)
    prefix = f"base_model.model.model.layers.0.{BLOCKS[name]}.experts"
    for projection, rows in zip(("gate_proj", "up_proj"), halves, strict=True):
        last = OLD_NAMES[projection] if name == "Mixtral" else projection
        for expert in range(EXPERTS):
            a, b = (tensors[f"{prefix}.{expert}.{last}.lora_{one}.weight"] for one in "AB")
            torch.testing.assert_close(b @ a, rows[expert])


def test_a_router_has_the_name_that_servers_read(tmp_path):
    router = {r"mlp\.gate$": "out in"}
    ours = adapted(build("Mixtral", "eager"), r"mlp\.gate$|" + ONLY_EXPERTS, layouts=router)
    contents = adapter_contents(ModelView(ours))
    write_lora(tmp_path, contents, experts="separate", model_type="mixtral")
    name = f"base_model.model.model.layers.0.{BLOCKS['Mixtral']}.gate"
    assert f"{name}.lora_A.weight" in tensors_of(tmp_path)


def test_servers_need_both_stacks(tmp_path):
    ours = adapted(build("Mixtral", "eager"), r"experts\.down_proj$")
    with refused_export(tmp_path, ours, "gate_up_proj is not; vLLM and SGLang read"):
        lora.export(ours, tmp_path / "lora", experts="separate")


def test_servers_refuse_what_was_trained_beside(tmp_path):
    ours = adapted(build("Mixtral", "eager"), also_train="norm")
    says, contents = r"other parameters \(.*norm\.weight", adapter_contents(ModelView(ours))
    with refused_export(tmp_path, ours, says):
        lora.export(ours, tmp_path / "lora", experts="separate")
    with refused_export(tmp_path, ours, says):
        write_lora(tmp_path / "lora", contents, experts="separate", model_type="mixtral")


@pytest.mark.parametrize("tied", [False, True])
def test_dense_layers_have_the_names_that_servers_read(tmp_path, tied):
    base = llama(vocab_size=20, tie_word_embeddings=tied).eval()
    ours = adapted(base, r"layers\.0\." if tied else r"layers\.0\.|embed_tokens|lm_head", 4)
    lora.export(ours, tmp_path, pad=True)
    sizes = {"q": (16, 16), "k": (8, 16), "v": (8, 16), "o": (16, 16)}
    layers = {f"self_attn.{name}_proj": size for name, size in sizes.items()}
    layers |= {f"mlp.{name}": size for name, size in zip(PROJECTIONS, DENSE, strict=True)}
    names = {f"model.layers.0.{name}": size for name, size in layers.items()}
    names |= {} if tied else {"lm_head": (20, 16)}
    expected = {}
    for name, (out, inputs) in names.items():
        expected[f"base_model.model.{name}.lora_A.weight"] = (8, inputs)
        expected[f"base_model.model.{name}.lora_B.weight"] = (out, 8)
    if not tied:
        embedding = "base_model.model.model.embed_tokens.lora_embedding"
        expected |= {f"{embedding}_A": (8, 20), f"{embedding}_B": (16, 8)}
    assert {key: tuple(one.shape) for key, one in tensors_of(tmp_path).items()} == expected
    assert isinstance(config_of(tmp_path)["target_modules"], list)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("experts", ["stacked", "separate"])
def test_updates_of_experts_are_never_truncated(tmp_path, experts):
    base = build("Mixtral", "eager")
    for options, rank in (({"method": "bat"}, 4), ({}, 2)):
        ours = adapted(base, ONLY_EXPERTS, **options)
        with refused_export(tmp_path, ours, "is a stack of experts"):
            lora.export(ours, tmp_path / "lora", rank=rank, experts=experts)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE"])
def test_separate_experts_are_merged_into_a_checkpoint_that_stores_them_so(tmp_path, name):
    base, merged = build(name, "eager"), []
    base.save_pretrained(tmp_path / "base")
    ours = adapted(base, scale=0.5)
    lora.export(ours, tmp_path / "separate", experts="separate")
    disha.save_adapter(ours, tmp_path / "stacked.safetensors")
    for adapter in ("separate", "stacked.safetensors"):
        out = tmp_path / f"merged-{adapter}"
        merge_into_checkpoint(tmp_path / "base", tmp_path / adapter, out)
        merged.append(tensors_in(out))
    assert_same(*merged)


def test_padded_ranks_are_all_the_same(tmp_path):
    """SGLang reads one rank for all layers; each was padded to its own."""
    base = build("Mixtral", "eager")
    ours = adapted(base, rank_pattern={"q_proj": 9})
    report = lora.export(ours, tmp_path, pad=True)
    assert {layer.rank for layer in report.layers} == {16}
    assert config_of(tmp_path)["rank_pattern"] == {}
    check_in_peft(base, tmp_path, ours)
    check_same_adapter(base, tmp_path, ours)


def test_arguments(tmp_path):
    ours = adapted(build("Llama-4", "eager"), ONLY_EXPERTS)
    with refused_export(tmp_path, ours, "'stacked' or 'separate', got 'each'", disha.ArgumentError):
        lora.export(ours, tmp_path / "lora", experts="each")
    with refused_export(tmp_path, ours, "which is llama4_text; known are mixtral"):
        lora.export(ours, tmp_path / "lora", experts="separate")
    contents = adapter_contents(ModelView(ours))
    with refused_export(tmp_path, ours, "which is unknown here; known are mixtral"):
        write_lora(tmp_path / "lora", contents, experts="separate")
    with refused_export(tmp_path, ours, "is 'expert in out'"):
        write_lora(tmp_path / "lora", contents, experts="separate", model_type="mixtral")


def test_an_adapter_for_other_experts_is_refused(tmp_path):
    ours = adapted(build("Mixtral", "eager"))
    lora.export(ours, tmp_path)
    for other in ({"num_local_experts": 2}, {"intermediate_size": 2 * INNER}):
        base = build("Mixtral", "eager", **other)
        with refused(base, disha.AdapterFileError, r"experts\.gate_up_proj"):
            lora.load(base, tmp_path)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"r": 5}, "in chunks of 5"),
        ({"r": 0}, "has settings that can't be read"),
        ({"target_parameters": ["experts.weight"]}, "is a parameter other than"),
    ],
)
def test_folders_that_are_refused(tmp_path, config, says):
    base = build("Mixtral", "eager")
    lora.export(adapted(base, ONLY_EXPERTS), tmp_path)
    rewrite(tmp_path, **config)
    with refused(base, (disha.ConversionError, disha.AdapterFileError), says):
        lora.load(base, tmp_path)


# --- without the model ---------------------------------------------------------------------------


def test_without_the_model_the_folder_is_the_same(tmp_path):
    ours = adapted(build("GPT-OSS", "eager"), ONLY_EXPERTS)
    for form in ("stacked", "separate"):
        lora.export(ours, tmp_path / "model", experts=form)
        contents = adapter_contents(ModelView(ours))
        write_lora(tmp_path / "file", contents, experts=form, model_type="gpt_oss")
        assert_same(tensors_of(tmp_path / "file"), tensors_of(tmp_path / "model"))


@pytest.mark.parametrize("model_type", [None, "llama4_text"])
def test_stacks_that_peft_may_transpose_are_refused_without_the_model(tmp_path, model_type):
    contents = adapter_contents(ModelView(adapted(build("GPT-OSS", "eager"), ONLY_EXPERTS)))
    with pytest.raises(disha.ConversionError, match=r"take its inputs for its outputs"):
        write_lora(tmp_path / "lora", contents, model_type=model_type)
    assert not (tmp_path / "lora").exists()


def test_the_command_writes_experts_and_reads_them(tmp_path, capsys):
    base = build("Mixtral", "eager")
    base.save_pretrained(tmp_path / "base")
    ours = adapted(base)
    path = tmp_path / "mine.safetensors"
    disha.save_adapter(ours, path)

    def convert(*arguments):
        capsys.readouterr()
        code = main(["convert", *map(str, arguments)])
        return code, "".join(capsys.readouterr())

    folder, back, given = tmp_path / "lora", tmp_path / "back", ("--base", tmp_path / "base")
    code, said = convert(path, folder, "--to", "lora")
    assert code == 0
    check_in_peft(base, folder, ours)
    code, said = convert(folder, back, "--to", "disha")
    assert code == 2
    assert "--base" in said
    assert convert(path, folder, "--to", "lora", "--overwrite", *given)[0] == 0
    assert convert(folder, back, "--to", "disha", "--overwrite", *given)[0] == 0
    again = copy.deepcopy(base)
    disha.load_adapter(again, back)
    assert torch.equal(again(TOKENS).logits, ours(TOKENS).logits)
    to_servers = (path, folder, "--to", "lora", "--experts", "separate", "--overwrite")
    code, said = convert(*to_servers)
    assert code == 2
    assert "--base" in said
    assert convert(*to_servers, *given)[0] == 0


def test_other_stacks_have_no_place_in_a_lora(tmp_path):
    ours = adapted(nn.Sequential(nn.Bilinear(8, 8, 3)), "0")
    contents = adapter_contents(ModelView(ours))
    [former] = contents.layers
    assert former.layout == Layout("expert out in")
    for name in ("0", "experts.weight"):
        layer = dataclasses.replace(former, name=name)
        tensors = {layer.key: contents.tensors[former.key]}
        changed = dataclasses.replace(contents, layers=(layer,), tensors=tensors)
        with pytest.raises(disha.ConversionError, match="LoRA can't express 1 of 1 layer"):
            write_lora(tmp_path / "lora", changed)
