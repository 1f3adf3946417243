import json
import shlex

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer

import disha
from disha.files.contents import read_contents
from disha.finetune.base import load_base
from disha.finetune.notes import base_note, read_noted_base, read_noted_bits, read_notes
from disha.interop import lora, peft
from tests.cli.conftest import DOWN, Q, model
from tests.conftest import assert_same, perturb
from tests.reference import GROUPS, KINDS, settings_of


def deltas(path, load=disha.load_adapter):
    """Layer -> dW of an adapter."""
    adapted = model()
    load(adapted, path)
    layers = {Q: adapted.layers[0].self_attn.q_proj, DOWN: adapted.layers[0].mlp.down_proj}
    return {
        name: layer.delta_weight(layer.disha["default"]).detach() for name, layer in layers.items()
    }


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in {*GROUPS, "lora"}])
def test_to_peft_and_back(run, files, kind):
    a = files.adapter(**settings_of(kind, 2))
    folder, back = files.path / "peft", files.path / "back"
    done = run("convert", a, folder, "--to", "peft")
    assert (done.code, done.err) == (0, "")
    assert done.out == f"{a} -> {folder} (peft): 2 layers\n"
    assert_same(deltas(folder, peft.load), deltas(a))
    assert run("convert", folder, back, "--to", "disha", "--base", files.base()).code == 0
    assert_same(deltas(back), deltas(a))


def test_to_lora_and_back(run, files):
    a, folder, back = files.adapter(), files.path / "lora", files.path / "back"
    assert run("convert", a, folder, "--to", "lora").code == 0
    assert "exact" in run("convert", a, files.path / "again", "--to", "lora").out
    assert contents(files.path / "again") == contents(folder)
    done = run("convert", folder, back, "--to", "disha")
    assert done.out == f"{folder} -> {back} (disha): 2 layers\n"
    assert_same(deltas(back), deltas(a))


@pytest.mark.parametrize(("r", "rank"), [(4, 8), (12, 16)])
def test_the_command_that_serves_a_lora_comes_from_the_file(run, files, r, rank):
    adapted = disha.inject_adapters(nn.Sequential(nn.Linear(16, 16)), "0", r)
    noted = {"base": json.dumps({"base_model_name_or_path": "./model", "bits": "fp32"})}
    file, folder = files.path / "a.safetensors", files.path / "mine"
    (files.path / "model").mkdir()
    disha.save_adapter(adapted, file, metadata=noted)
    done = run("convert", file, folder, "--to", "lora")
    served = f"vllm serve {files.path / 'model'} --enable-lora --max-lora-rank {rank} --max-loras 2"
    assert done.out.splitlines()[-1] == f"to serve it: {served} --lora-modules mine={folder}"


def beside_a_norm():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.BatchNorm1d(8))


def test_an_embedding_goes_from_lora_to_lora_and_back(run, files):
    adapted = disha.inject_adapters(beside_a_norm(), target_regex="0|1", r=4, init="kaiming")
    a, first, second, back = (files.path / name for name in ("a", "first", "second", "back"))
    disha.save_adapter(adapted, a)
    assert run("convert", a, first, "--to", "lora").code == 0
    assert run("convert", first, second, "--to", "lora").code == 0
    assert contents(second) == contents(first)
    assert run("convert", second, back, "--to", "disha").code == 0
    again = beside_a_norm()
    disha.load_adapter(again, back)
    for layers in zip(again[:2], adapted[:2], strict=True):
        assert torch.equal(*(layer.delta_weight(layer.disha["default"]) for layer in layers))


def test_running_statistics_in_a_lora_stay_behind_if_asked(run, files):
    folder, out = files.path / "lora", files.path / "out"
    adapted = disha.inject_adapters(beside_a_norm(), target_regex="1", r=4, also_train="2")
    lora.export(adapted, folder)
    assert run("convert", folder, out, "--to", "disha").code == 0
    assert "2.running_mean" in read_contents(out).tensors
    given = ("--to", "disha", "--no-also-train", "--overwrite")
    assert run("convert", folder, out, *given).code == 0
    assert list(read_contents(out).tensors) == ["1.bone_block"]


def test_the_weights_of_a_peft_folder_stand_for_the_folder(run, files):
    folder = files.path / "lora"
    lora.export(disha.inject_adapters(beside_a_norm(), target_regex="1", r=4), folder)
    outs = files.path / "one", files.path / "other"
    for source, out in zip((folder, folder / "adapter_model.safetensors"), outs, strict=True):
        assert run("convert", source, out, "--to", "disha").code == 0
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_from_peft_to_lora(run, files):
    a, folder, out = files.adapter(), files.path / "peft", files.path / "lora"
    run("convert", a, folder, "--to", "peft")
    assert run("convert", folder, out, "--to", "lora", "--base", files.base()).code == 0
    assert_same(deltas(out, lora.load), deltas(a))


def test_bat_is_cut_and_the_error_told(run, files):
    a, base, out = files.adapter(method="bat"), files.base(), files.path / "lora"
    given = ("convert", a, out, "--to", "lora", "--base", base, "--rank", 3)
    told = run(*given).out
    tensors = peft_tensors(out)
    largest = 0.0
    for name, delta in deltas(a).items():
        product = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        lost = float((delta - product).norm() / delta.norm())
        assert 0.01 < lost < 1
        largest = max(largest, lost)
    assert f"largest error {largest:.3g}\n" in told


def peft_tensors(folder):
    return {
        key.removeprefix("base_model.model."): value
        for key, value in load_file(folder / "adapter_model.safetensors").items()
    }


def test_what_depends_on_another_base_is_refused(run, complaint, files):
    bat, bone = files.adapter("bat", method="bat", base=5), files.adapter("bone", base=5)
    given = (files.path / "out", "--to", "lora", "--base", files.base(), "--rank", 4)
    says = "other values than the weight that the adapter was saved from"
    assert says in complaint("convert", bat, *given)
    assert run("convert", bone, *given).code == 0


def test_an_adapter_of_the_inner_model_finds_its_base(run, files):
    """The checkpoint has the model under one more prefix."""
    base, folder = files.base(), files.path / "peft"
    weights = load_file(base / "model.safetensors")
    save_file({f"model.{k}": v for k, v in weights.items()}, base / "model.safetensors")
    a = files.adapter(method="bat")
    run("convert", a, folder, "--to", "peft")
    back, cut = files.path / "back", files.path / "lora"
    assert run("convert", folder, back, "--to", "disha", "--base", base).code == 0
    assert_same(deltas(back), deltas(a))
    assert run("convert", a, cut, "--to", "lora", "--base", base, "--rank", 8).code == 0


def test_further_parameters_are_left_out_if_asked(run, complaint, files):
    a, out = files.adapter(also_train="norm.weight"), files.path / "out"
    assert "norm.weight" in complaint("convert", a, out, "--to", "peft")
    assert run("convert", a, out, "--to", "peft", "--no-also-train").code == 0
    plain = files.path / "plain"
    assert run("convert", a, plain, "--to", "disha", "--no-also-train").code == 0
    header = disha.inspect_adapter(plain)
    assert (header.also_train, header.config.also_train) == ((), ())


@pytest.fixture(params=[peft, lora], ids=["peft", "lora"])
def with_embedding(request, files):
    """A folder of PEFT with a trained embedding, and its base as a file beside `config.json`."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"embed": nn.Embedding(12, 8), "q": nn.Linear(8, 8)})
    state = {name: value.detach().clone() for name, value in base.state_dict().items()}
    save_file(state, files.path / "model.safetensors")
    folder = files.path / "folder"
    request.param.export(disha.inject_adapters(base, "q", 4, also_train="embed"), folder)
    return ("convert", folder, files.path / "out", "--to", "disha")


TYING = [
    {"tie_word_embeddings": True},
    {"text_config": {"tie_word_embeddings": True}},
    {},
    {"vocab_size": 11},
    {"vocab_size": 12},
]
NOT_TYING = [
    {"vocab_size": 13},  # then the embedding is a head of another kind
    {"tie_word_embeddings": False},
    {"model_type": "llava", "text_config": {"tie_word_embeddings": False}},
]


@pytest.mark.parametrize("config", TYING)
def test_a_tied_parameter_that_peft_saves_alone_is_refused(
    complaint, files, with_embedding, config
):
    """PEFT trains a copy of the embedding; an adapter file would change the head too."""
    (files.path / "config.json").write_text(json.dumps(config))
    given = (*with_embedding, "--base", files.path / "model.safetensors")
    assert "unties an embedding" in complaint(*given)


@pytest.mark.parametrize("config", NOT_TYING)
def test_a_parameter_that_is_not_tied_is_converted(run, files, with_embedding, config):
    (files.path / "config.json").write_text(json.dumps(config))
    assert run(*with_embedding, "--base", files.path / "model.safetensors").code == 0
    assert read_contents(files.path / "out").also_train == ("embed.weight",)


def test_a_tied_parameter_is_left_out_if_asked(run, files, with_embedding):
    given = (*with_embedding, "--base", files.path / "model.safetensors", "--no-also-train")
    assert run(*given).code == 0
    assert read_contents(files.path / "out").also_train == ()


def test_a_saved_matrix_of_a_lora_needs_the_base(run, complaint, files):
    """Without the base, nothing shows whether PEFT unties the matrix from another parameter."""
    base = nn.ModuleDict({"embed": nn.Embedding(12, 8), "q": nn.Linear(8, 8)})
    folder, file = files.path / "folder", files.path / "a.safetensors"
    lora.export(disha.inject_adapters(base, "q", 4, also_train="embed"), folder)
    disha.save_adapter(base, file)
    for source, form in ((folder, "disha"), (file, "lora")):
        given = ("convert", source, files.path / form, "--to", form)
        says = complaint(*given)
        assert "embed.weight" in says
        assert "--base" in says
        assert run(*given, "--no-also-train").code == 0


NOTED = {"prompt": "chat", "chat_template": "{{ messages }}"}


@pytest.mark.parametrize("form", ["peft", "lora"])
def test_the_folder_names_the_base_and_the_task_that_the_file_notes(run, files, form):
    base, out = files.base(), files.path / "out"
    note = base_note(str(base), "fp32", files.path / "a.safetensors")
    a = files.adapter(metadata={**NOTED, "base": note})
    assert run("convert", a, out, "--to", form).code == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == (str(base), "CAUSAL_LM")
    assert (out / "chat_template.jinja").read_text() == NOTED["chat_template"]


@pytest.mark.parametrize(
    ("architecture", "task"),
    [("GPT2LMHeadModel", "CAUSAL_LM"), ("LlavaForConditionalGeneration", None)],
)
def test_the_base_that_is_given_tells_the_task(run, files, architecture, task):
    base = files.base(config={"architectures": [architecture]})
    out = files.path / "out"
    assert run("convert", files.adapter(), out, "--to", "lora", "--base", base).code == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == (str(base), task)


def test_a_base_that_is_not_where_it_was_is_not_named(run, files):
    a, out = files.adapter(metadata={"base": '{"base_model_name_or_path": "./gone"}'}), "out"
    assert run("convert", a, files.path / out, "--to", "lora").code == 0
    config = json.loads((files.path / out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None


def test_from_lora_to_lora_the_notes_stay(run, files):
    note = json.dumps({"base_model_name_or_path": "some/name", "bits": "bf16"})
    a, first, second = files.adapter(metadata={"base": note}), files.path / "1", files.path / "2"
    run("convert", a, first, "--to", "lora")
    assert run("convert", first, second, "--to", "lora").code == 0
    assert contents(second) == contents(first)


def test_an_adapter_file_elsewhere_still_finds_its_base(run, files):
    base, out = files.base(), files.path / "folder" / "b.safetensors"
    note = base_note(str(base), "bf16", files.path / "a.safetensors")
    a = files.adapter(metadata={"base": note})
    out.parent.mkdir()
    assert run("convert", a, out, "--to", "disha").code == 0
    assert read_noted_base(out, read_notes(out)) == str(base)
    assert read_noted_bits(read_notes(out)) == "bf16"


def test_a_folder_of_miss_that_names_its_base_needs_no_other(run, files):
    base, folder, out = files.base(), files.path / "peft", files.path / "out"
    a = files.adapter()
    run("convert", a, folder, "--to", "peft", "--base", base)
    assert run("convert", folder, out, "--to", "disha").code == 0
    assert_same(deltas(out), deltas(a))


def last_line(done):
    assert done.code == 0, done.err
    return done.out.splitlines()[-1]


def test_the_line_that_serves_a_lora_is_printed(run, files):
    note = json.dumps({"base_model_name_or_path": "some/name"})
    a, out = files.adapter(metadata={"base": note, **NOTED}), files.path / "out"
    assert last_line(run("convert", a, out, "--to", "lora")) == (
        "to serve it: vllm serve some/name --enable-lora --max-lora-rank 8 --max-loras 2 "
        f"--lora-modules out={out} --chat-template {out}/chat_template.jinja"
    )


def test_without_a_noted_base_the_line_has_a_place_for_it(run, files):
    line = last_line(run("convert", files.adapter(), files.path / "out", "--to", "lora"))
    assert "vllm serve BASE --enable-lora" in line


def test_parameters_that_vllm_refuses_are_named(run, files):
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    trained = disha.inject_adapters(model, target_regex="0", r=4, also_train="1")
    disha.save_adapter(trained, files.path / "a")
    out = files.path / "out"
    done = run("convert", files.path / "a", out, "--to", "lora")
    assert last_line(done) == (
        "vLLM and SGLang refuse it, because it holds 1.bias, 1.weight; to serve it, merge it: "
        f"disha merge BASE {files.path / 'a'} {out}-merged"
    )


def test_stacked_experts_that_vllm_does_not_read_are_named(run, files):
    experts = nn.Module()
    experts.gate_up_proj = nn.Parameter(torch.randn(2, 8, 6))
    layouts = {"gate_up_proj": "expert out in"}
    model = nn.ModuleDict({"experts": experts})
    disha.inject_adapters(model, target_regex="gate_up_proj", r=4, layouts=layouts)
    disha.save_adapter(model, files.path / "a")
    line = last_line(run("convert", files.path / "a", files.path / "out", "--to", "lora"))
    assert "give --experts separate" in line


@pytest.fixture
def with_new_tokens(language_model, tmp_path):
    """An adapter file with two new tokens, as `disha finetune --new_tokens` writes it."""
    base, path = str(language_model / "model"), tmp_path / "a.safetensors"
    notes = {"new_tokens": '["<think>", "</think>"]', "prompt": "chat"}
    notes["base"] = base_note(base, "fp32", path)
    model, tokenizer = load_base(base, notes=notes)
    rows = {"embed_tokens|lm_head": [len(tokenizer) - 2, len(tokenizer) - 1]}
    disha.inject_adapters(model, target_regex="q_proj", r=4, also_train_rows=rows)
    disha.save_adapter(perturb(model), path, metadata=notes)
    return path


def test_the_tokenizer_of_new_tokens_is_in_the_folder(run, with_new_tokens, tmp_path):
    assert run("convert", with_new_tokens, tmp_path / "out", "--to", "lora").code == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer.encode("<think></think>", add_special_tokens=False)) == 2


def test_new_tokens_are_served_by_the_merged_model_that_is_named(run, with_new_tokens, tmp_path):
    done = run("convert", with_new_tokens, tmp_path / "out", "--to", "lora")
    merge = last_line(done).partition("to serve it, merge it: disha ")[2]
    assert run(*shlex.split(merge)).code == 0
    _, tokenizer = load_base(str(tmp_path / "out-merged"))
    assert len(tokenizer.encode("<think></think>", add_special_tokens=False)) == 2


def test_ranks_are_padded_if_asked(run, files):
    a, out = files.adapter(), files.path / "lora"
    assert run("convert", a, out, "--to", "lora", "--pad-rank").code == 0
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 8


def test_what_is_there_stays_unless_told(run, complaint, files):
    a, out = files.adapter(), files.path / "out"
    out.write_text("mine")
    assert "--overwrite" in complaint("convert", a, out, "--to", "disha")
    assert out.read_text() == "mine"
    assert run("convert", a, out, "--to", "peft", "--overwrite").code == 2  # a file, no folder
    assert out.read_text() == "mine"
    assert run("convert", a, out, "--to", "disha", "--overwrite").code == 0
    assert_same(deltas(out), deltas(a))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "folder/adapter.safetensors"),
        (json.dumps({"peft_type": "LORA"}), "adapter_model.safetensors"),
        ("{", "adapter_config.json is no JSON object"),
        ("[5]", "adapter_config.json is no JSON object"),
    ],
)
def test_a_folder_that_is_no_adapter(complaint, files, content, says):
    folder = files.path / "folder"
    folder.mkdir()
    if content is not None:
        (folder / "adapter_config.json").write_text(content)
    assert says in complaint("convert", folder, files.path / "out", "--to", "disha")


@pytest.mark.parametrize(
    ("source", "flags", "says"),
    [
        ("absent", ("--to", "peft"), "absent"),
        ("base/model.safetensors", ("--to", "peft"), "not written by disha"),
        ("peft", ("--to", "disha"), "give it (`base`, --base)"),
        ("peft", ("--to", "disha", "--base", "absent"), "absent"),
        ("peft", ("--to", "disha", "--base", "a"), "lacks layers.0"),
        ("bat", ("--to", "lora"), "--rank"),
        ("bat", ("--to", "lora", "--rank", "2"), "--base"),
        ("rows", ("--to", "lora"), "--base"),
        ("a", ("--to", "lora", "--rank", "0"), "--rank: must be a whole number from 1"),
        ("a", ("--to", "peft", "--rank", "4"), "--rank is for --to lora and diffusers, not"),
        ("a", ("--to", "peft", "--component", "unet"), "--component is for image models"),
    ],
)
def test_bad_input(run, complaint, files, monkeypatch, source, flags, says):
    monkeypatch.chdir(files.path)
    files.base()
    files.adapter("a")
    files.adapter("bat", method="bat")
    files.adapter("rows", rows={"q_proj": [(0, 4)]})
    run("convert", "a", "peft", "--to", "peft")
    assert says in complaint("convert", source, "out", *flags)


@pytest.mark.parametrize(("flags", "says"), [(("--to", "onnx"), "onnx"), ((), "--to")])
def test_wrong_usage(complaint, files, flags, says):
    assert says in complaint("convert", files.path / "a", files.path / "out", *flags)


def test_an_image_lora_names_the_flag_of_its_component(complaint, files):
    assert "name it with --component" in complaint(
        "convert", files.adapter(), files.path / "out", "--to", "diffusers"
    )
