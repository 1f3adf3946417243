"""Language models that the built-in decoder does not read, through transformers."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import disha
from disha.finetune.base_model import open_base_model
from disha.finetune.data.batches import collate
from disha.finetune.data.examples import Example
from disha.finetune.errors import CheckpointError, UnsupportedModelError
from disha.finetune.settings import ModelSettings
from disha.finetune.training.objectives import objective_for
from tests.finetune import tiny_checkpoints
from tests.finetune.command_line import killed_after, report_of, result_of

CPU = torch.device("cpu")
JOINED = ("mixtral", "qwen3_moe")
"""Their files hold every expert alone."""

RATE = 4e-3
EXPERTS = (*JOINED, "gpt_oss")


def opened(folder, **settings):
    return open_base_model(ModelSettings(base_model_name_or_path=folder, **settings))


@torch.no_grad()
def logits_of(folder, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if adapter is not None:
        disha.load_adapter(model, adapter)
    return model(torch.arange(3, 43).reshape(2, 20)).logits


@pytest.mark.parametrize("family", tiny_checkpoints.OTHERS)
def test_a_model_is_trained_asked_measured_and_merged(finetune, tiny_folder, tmp_path, family):
    folder, output = tiny_folder(family), tmp_path / "output"
    flags = {"base_model_name_or_path": folder, "output_dir": output, "learning_rate": RATE}
    done = finetune("--merge", max_steps=12, **flags)
    assert (done.code, done.err) == (0, "")
    report = report_of(output)
    assert report["loss"]["after"] < 0.95 * report["loss"]["before"]
    samples = report["samples"]
    assert any(one["before"] != one["after"] for one in samples)

    adapter = output / "adapter.safetensors"
    layers = disha.inspect_adapter(adapter).layers
    moved = load_file(adapter)
    assert all(block.abs().max() > 0 for block in moved.values())
    assert not any("embed" in layer.name for layer in layers)
    if family in EXPERTS:
        assert sum(".experts." in name for name in moved) == 4

    adapted = logits_of(folder, adapter)
    merged = tmp_path / "by-itself"
    assert finetune.other("merge", folder, adapter, merged).code == 0
    for one in (output / "merged", merged):
        torch.testing.assert_close(logits_of(one), adapted, rtol=1e-4, atol=1e-4)
        assert tensors_of(one) == tensors_of(folder)
        assert (one / "config.json").read_text() == (folder / "config.json").read_text()
    assert (adapted - logits_of(folder)).abs().max() > 0.1

    asked = ("generate", "--base_model_name_or_path", folder, "--prompt", "say well 3", "--json")
    with_adapter = finetune.other(*asked, "--adapter", adapter)
    assert with_adapter.code == 0, with_adapter.err
    from_merged = finetune.other(*asked[:2], merged, *asked[3:], "--template", "auto")
    assert answer_of(with_adapter) == answer_of(from_merged)

    rows = ("--data_path", tmp_path / "rows.jsonl", "--max_seq_length", 96, "--json")
    evaluated = ("evaluate", "--base_model_name_or_path", folder, *rows, "--adapter", adapter)
    found = json.loads(finetune.other(*evaluated, "--compare").out)
    assert found["model"]["loss"] < found["base"]["loss"]


def test_weights_that_r_does_not_fit_are_left_out_and_named(finetune, tiny_folder):
    folder = tiny_folder("mamba")
    dry = finetune("--dry_run", base_model_name_or_path=folder)
    assert dry.code == 0
    assert "skipped backbone.layers.1.mixer.dt_proj (Linear): r=8 is larger" in dry.out
    wet = finetune(base_model_name_or_path=folder, max_steps=1)
    assert "left out 2 weights that r does not fit; --dry_run names them" in wet.out
    other = {"output_dir": finetune.output.with_name("other"), "max_steps": 1}
    asked = finetune(base_model_name_or_path=folder, target="dt_proj|in_proj", **other)
    assert asked.code == 2
    assert "--bone_r 8 is larger than in_features=4" in asked.complaint
    less = finetune(base_model_name_or_path=folder, exclude="dt_proj|x_proj", **other)
    assert "left out" not in less.out
    layers = disha.inspect_adapter(other["output_dir"] / "adapter.safetensors").layers
    assert {layer.name.rpartition(".")[2] for layer in layers} == {"in_proj", "out_proj"}


def answer_of(done):
    return json.loads(done.out)["answers"][0]["answer"]


def tensors_of(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama2", {"attention_bias": True, "mlp_bias": True}),
        ("llama2", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}}),
        ("llama3", {"rope_parameters": {"rope_type": "yarn", "factor": 3.0, "rope_theta": 1e4}}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
        ("qwen3", {"attention_bias": True}),
    ],
)
@torch.no_grad()
def test_what_the_built_in_decoder_does_not_compute_is_computed(tmp_path, family, changes):
    reference = tiny_checkpoints.random_model(family, **changes)
    base = opened(tiny_checkpoints.write_folder(tmp_path / "model", family, **changes))
    tokens = torch.arange(3, 63).reshape(2, 30)
    torch.testing.assert_close(base.load(CPU)(tokens).logits, reference(tokens).logits)


@pytest.mark.parametrize("family", tiny_checkpoints.OTHERS)
@torch.no_grad()
def test_padding_changes_no_loss(tiny_folder, family):
    model = opened(tiny_folder(family)).load(CPU).eval()
    objective = objective_for(model, has_tokenizer=True)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (5, 31, 12):
        ids = tuple(torch.randint(3, 200, (length,), generator=generator).tolist())
        rows.append([Example(ids, ((2, length),))])
    together = objective(collate(rows))
    alone = sum(
        F.cross_entropy(model(one.tokens).logits[0], one.labels[0], reduction="sum")
        for one in (collate([row]) for row in rows)
    )
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@torch.no_grad()
def test_losses_of_the_routers_do_not_count(tmp_path, tiny_folder, family):
    folder = shutil.copytree(tiny_folder(family), tmp_path / family)
    tiny_checkpoints.edit_config(folder, output_router_logits=True, router_aux_loss_coef=7.0)
    batch = collate([[Example(tuple(range(3, 40)), ((1, 37),))]])
    losses = [
        objective_for(opened(one).load(CPU), has_tokenizer=True)(batch)
        for one in (folder, tiny_folder(family))
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize(("family", "bits"), [("qwen3_moe", "8"), ("phi", "4"), ("gemma3", "bf16")])
def test_a_model_is_kept_in_fewer_bits(finetune, tiny_folder, tmp_path, family, bits):
    folder, output = tiny_folder(family), tmp_path / "output"
    flags = {"base_model_name_or_path": folder, "output_dir": output, "learning_rate": RATE}
    done = finetune(*(["--verify"] if bits == "8" else []), bits=bits, **flags)
    assert (done.code, done.err) == (0, "")
    loss = report_of(output)["loss"]
    assert loss["after"] < loss["before"]
    model = opened(folder, bits=bits).load(CPU)
    kinds = {type(model.get_submodule("model.layers.1.self_attn.q_proj")).__name__}
    assert kinds == {{"8": "Linear8bitLt", "4": "Linear4bit", "bf16": "Linear"}[bits]}
    assert type(model.lm_head).__name__ == "Linear"


def test_a_model_that_quantised_layers_break_is_refused(finetune, tiny_folder):
    done = finetune(base_model_name_or_path=tiny_folder("mamba"), bits="4")
    assert done.code == 2
    assert "does not work in 4 bits (give --bits bf16)" in done.complaint


def test_a_run_goes_on_to_the_same_end(finetune, tiny_folder, tmp_path):
    folder = tiny_folder("mixtral")
    usual = {"base_model_name_or_path": folder, "save_strategy": "steps", "save_steps": 2}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finetune.good("--gradient_checkpointing", output_dir=whole, **usual)
    killed_after(3, lambda: finetune("--gradient_checkpointing", output_dir=parts, **usual))
    finetune.good("--gradient_checkpointing", "--resume", output_dir=parts, **usual)
    assert result_of(parts) == result_of(whole)


@pytest.mark.parametrize(
    ("kind", "other_base"),
    [
        ("qwen3_moe", "other values than the weight"),
        ("sarvam_moe", "saved from other base weights"),  # transformers has to load it
    ],
)
def test_weights_that_are_stored_in_parts_are_merged_as_asked(finetune, tmp_path, kind, other_base):
    folder = tiny_checkpoints.write_folder(tmp_path / "base", kind)
    out = tmp_path / "merged"
    finetune.good(base_model_name_or_path=folder, max_steps=2)
    adapter = finetune.output / "adapter.safetensors"
    merge = ("merge", folder, adapter, out)
    assert finetune.other(*merge, "--scale", 0.5, "--dtype", "bfloat16").code == 0
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    disha.load_adapter(model, adapter)
    disha.set_adapter_scale(model, 0.5)
    disha.merge_adapters(model)
    model.bfloat16()  # rounded once
    found = AutoModelForCausalLM.from_pretrained(out)
    assert found.dtype == torch.bfloat16
    for name, value in found.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert "not empty" in finetune.other(*merge).complaint

    other = tiny_checkpoints.write_folder(tmp_path / "other", kind, seed=7)
    merge = ("merge", other, adapter, tmp_path / "wrong")
    refused = finetune.other(*merge)
    assert refused.code == 2
    assert other_base in refused.complaint
    assert finetune.other(*merge, "--force").code == 0


def test_older_files_of_a_tokenizer_are_read(finetune, tmp_path, tiny_folder):
    folder = shutil.copytree(tiny_folder("phi"), tmp_path / "model")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "GPT2Tokenizer", "unk_token": "<|im_start|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours, expected = opened(folder).tokenizer, opened(tiny_folder("phi")).tokenizer
    assert ours.encode("hello world, say 3") == expected.encode("hello world, say 3")
    assert (ours.end, ours.chat_template) == (expected.end, expected.chat_template)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    done = finetune(base_model_name_or_path=folder)
    assert done.code == 2
    assert "makes no tokens of a text, as its files are missing" in done.complaint


def test_rows_are_not_packed(finetune, tiny_folder):
    done = finetune("--packing", base_model_name_or_path=tiny_folder("phi"))
    assert done.code == 2
    assert "as the built-in Llama, Mistral, Qwen2 and Qwen3 do; leave it out" in done.complaint


# --- what can't be read ---------------------------------------------------------------------------


@pytest.fixture
def without_transformers(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "transformers" else found(name)
    )


def test_without_transformers_the_extra_is_named(finetune, tiny_folder, without_transformers):
    done = finetune(base_model_name_or_path=tiny_folder("gemma3"))
    assert done.code == 2
    assert "architecture 'gemma3_text'" in done.complaint
    assert "pip install 'disha-torch[transformers]'" in done.complaint


@pytest.mark.parametrize("kind", ["mixtral", "sarvam_moe"])
def test_only_experts_are_merged_without_transformers(finetune, tmp_path, monkeypatch, kind):
    folder, output = tiny_checkpoints.write_folder(tmp_path / "base", kind), tmp_path / "output"
    assert finetune(base_model_name_or_path=folder, output_dir=output, max_steps=1).code == 0
    adapter, out = output / "adapter.safetensors", tmp_path / "merged"
    if kind == "sarvam_moe":
        one_file = finetune.other("merge", folder, adapter, tmp_path / "x.safetensors")
        assert "must be a folder" in one_file.complaint
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "transformers" else found(name)
    )
    done = finetune.other("merge", folder, adapter, out)
    assert done.code == (0 if kind == "mixtral" else 2)
    assert out.exists() == (kind == "mixtral")
    needed = "pip install 'disha-torch[transformers]'" in done.err
    assert needed == (kind == "sarvam_moe")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_type": "unheard_of"}, "architecture 'unheard_of', which transformers .* not know"),
        ({"model_type": ["llama"]}, r"architecture \['llama'\], which transformers .* not know"),
        (
            {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "code.Model"}},
            "the code that comes with it is never run",
        ),
        ({"model_type": "vit"}, "no language model to transformers"),
        ({"num_hidden_layers": 3}, r"layers\.2\..* is missing or of another shape"),
        ({"intermediate_size": 32}, "is missing or of another shape"),
        ({"num_attention_heads": "four"}, "can't be read by transformers|can't be loaded"),
    ],
)
def test_what_transformers_can_not_load_is_said_in_one_line(
    finetune, tmp_path, tiny_folder, changes, complaint
):
    folder = shutil.copytree(tiny_folder("phi"), tmp_path / "model")
    (folder / "code.py").write_text("raise SystemExit('this must never run')\n")
    tiny_checkpoints.edit_config(folder, **changes)
    done = finetune(base_model_name_or_path=folder)
    assert done.code == 2
    assert re.search(complaint, done.complaint), done.complaint


def test_a_model_that_looks_ahead_is_refused(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = AutoConfig.for_model("bert", vocab_size=300, num_attention_heads=2, **sizes)
    folder = tmp_path / "bert"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_checkpoints.write_tokenizer(folder)
    with pytest.raises(CheckpointError, match="sees the tokens that it is to predict"):
        opened(folder).load(CPU)


def test_weights_quantised_already_are_not_quantised_again(tmp_path, tiny_folder):
    folder = shutil.copytree(tiny_folder("phi"), tmp_path / "model")
    tiny_checkpoints.edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match="quantised already, so --bits 8"):
        opened(folder, bits="8").load(CPU)


def test_gguf_files_of_other_models_are_refused(tmp_path, tiny_folder):
    file = tiny_checkpoints.write_gguf(tmp_path / "model.gguf", "qwen3")
    content = file.read_bytes().replace(b"qwen3", b"gpt22")
    file.write_bytes(content)
    with pytest.raises(UnsupportedModelError, match="folders of other language models"):
        opened(file)
