import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import disha
from disha.files.contents import read_contents
from disha.interop import lora, peft
from tests.cli.conftest import DOWN, Q, model
from tests.conftest import assert_same


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


@pytest.mark.parametrize("injected", [{}, {"r_out": 2}, {"method": "bat"}])
def test_to_peft_and_back(run, files, injected):
    a, folder, back = files.adapter(**injected), files.path / "peft", files.path / "back"
    done = run("convert", a, folder, "--to", "peft")
    assert (done.code, done.err) == (0, "")
    assert done.out == f"{a} -> {folder} (peft): 2 layers\n"
    assert_same(deltas(folder, peft.load), deltas(a))
    assert run("convert", folder, back, "--to", "disha", "--base", files.base()).code == 0
    assert_same(deltas(back), deltas(a))


def test_bat_leaves_its_dropout_behind_for_peft_when_asked(run, complaint, files):
    a, folder = files.adapter(method="bat", dropout=0.1), files.path / "peft"
    assert "dropout" in complaint("convert", a, folder, "--to", "peft")
    assert run("convert", a, folder, "--to", "peft", "--dropout", 0.0).code == 0
    assert_same(deltas(folder, peft.load), deltas(a))


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
    disha.save_adapter(adapted, file, metadata=noted)
    done = run("convert", file, folder, "--to", "lora")
    served = f"vllm serve {files.path / 'model'} --enable-lora --max-lora-rank {rank}"
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


def test_from_peft_to_lora(run, files):
    a, folder, out = files.adapter(), files.path / "peft", files.path / "lora"
    run("convert", a, folder, "--to", "peft")
    assert run("convert", folder, out, "--to", "lora", "--base", files.base()).code == 0
    assert_same(deltas(out, lora.load), deltas(a))


def test_bat_is_cut_and_the_error_told(run, files):
    a, base, out = files.adapter(method="bat"), files.base(), files.path / "lora"
    given = ("convert", a, out, "--to", "lora", "--base", base, "--rank", 3)
    rows = {line.split()[0]: line.split() for line in run(*given).out.splitlines()}
    tensors = peft_tensors(out)
    for name, delta in deltas(a).items():
        product = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        lost = float((delta - product).norm() / delta.norm())
        assert rows[name][1:4] == ["bat", "4", "3"]
        assert 0.01 < lost < 1
        assert float(rows[name][4]) == pytest.approx(lost, rel=1e-2)


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


@pytest.mark.parametrize("form", [peft, lora])
def test_a_tied_parameter_that_peft_saves_alone_is_refused(run, files, form):
    """PEFT trains a copy of the embedding; an adapter file would change the head too."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"embed": nn.Embedding(12, 8), "q": nn.Linear(8, 8)})
    folder, out = files.path / "folder", files.path / "out"
    form.export(disha.inject_adapters(base, "q", 4, also_train="embed"), folder)
    state = {"embed.weight": base["embed"].weight.detach(), "q.weight": base["q"].base_weight}
    save_file({k: v.detach().clone() for k, v in state.items()}, files.path / "model.safetensors")
    given = ("convert", folder, out, "--to", "disha", "--base", files.path / "model.safetensors")
    for config, code in (
        ({"tie_word_embeddings": True}, 2),
        ({}, 2),
        *(({"vocab_size": size}, 2) for size in (11, 12)),
        ({"vocab_size": 13}, 0),  # then it is a head of another kind
        ({"tie_word_embeddings": False}, 0),
    ):
        (files.path / "config.json").write_text(json.dumps(config))
        done = run(*given, "--overwrite")
        assert done.code == code, done.err
        assert ("unties an embedding" in done.err) == (code == 2)
        assert run(*given, "--overwrite", "--no-also-train").code == 0


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
        (None, "has neither adapter.safetensors nor adapter_config.json"),
        (json.dumps({"peft_type": "LOHA"}), "is of peft_type 'LOHA', not MISS, BONE, LORA"),
        (json.dumps({"peft_type": "LORA"}), "adapter_model.safetensors"),
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
        ("peft", ("--to", "disha"), "give --base"),
        ("peft", ("--to", "disha", "--base", "absent"), "absent"),
        ("peft", ("--to", "disha", "--base", "a"), "lacks layers.0"),
        ("bat", ("--to", "lora"), "--rank"),
        ("bat", ("--to", "lora", "--rank", "2"), "--base"),
        ("rows", ("--to", "lora"), "--base"),
        ("a", ("--to", "lora", "--rank", "0"), "rank must be at least 1"),
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
    assert "(--component of disha convert)" in complaint(
        "convert", files.adapter(), files.path / "out", "--to", "diffusers"
    )
