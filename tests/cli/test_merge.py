import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import disha
from disha.finetune.base import load_base
from tests.cli.conftest import model
from tests.conftest import assert_same


def merged(path, scale=None):
    adapted = model()
    disha.load_adapter(adapted, path)
    if scale is not None:
        disha.set_adapter_scale(adapted, scale)
    disha.merge_adapters(adapted, unload=True)
    return adapted.state_dict()


def test_a_folder_becomes_a_folder(run, files):
    base, adapter, out = files.base(config={"heads": 2}), files.adapter(), files.path / "out"
    done = run("merge", base, adapter, out)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"{out}: 2 layers merged")
    assert_same(load_file(out / "model.safetensors"), merged(adapter))
    assert (out / "config.json").read_text() == (base / "config.json").read_text()


def test_a_file_with_another_scale(run, files):
    base, adapter, out = files.base(), files.adapter(), files.path / "out.safetensors"
    assert run("merge", base / "model.safetensors", adapter, out, "--scale", 0.5).code == 0
    assert_same(load_file(out), merged(adapter, 0.5))


def test_further_parameters_are_left_alone_if_asked(run, files):
    base, adapter, out = files.base(), files.path / "a.safetensors", files.path / "out"
    trained = disha.inject_adapters(model(), target_regex="q_proj", r=4, also_train="norm.weight")
    with torch.no_grad():
        trained.norm.weight.mul_(3)
    disha.save_adapter(trained, adapter)
    for flags, expected in (
        ((), 3 * model().norm.weight),
        (("--no-also-train",), model().norm.weight),
    ):
        assert run("merge", base, adapter, out, "--overwrite", *flags).code == 0
        assert torch.equal(load_file(out / "model.safetensors")["norm.weight"], expected)


def test_the_base_that_the_file_notes_is_found(run, language_model, tmp_path):
    adapter, out = language_model / "adapter.safetensors", tmp_path / "merged"
    done = run("merge", language_model, out)  # a folder stands for the file in it
    assert done.code == 0
    assert "as" in done.err
    found, _ = load_base(str(out))
    expected, _ = load_base(str(language_model / "model"))
    disha.load_adapter(expected, adapter)
    disha.merge_adapters(expected, unload=True)
    assert_same(found.state_dict(), expected.state_dict())


def test_a_base_that_is_a_name_takes_the_same_flags(run, language_model, tmp_path, monkeypatch):
    base, adapter, out = str(language_model / "model"), tmp_path / "a.safetensors", tmp_path / "out"
    trained, _ = load_base(base)
    disha.inject_adapters(trained, "q_proj", r=4, also_train="model.norm.weight", init="kaiming")
    with torch.no_grad():
        trained.model.norm.weight.mul_(3)
    disha.save_adapter(trained, adapter)
    monkeypatch.setattr("disha.finetune.base.load_base", lambda name, bits, **_: load_base(base))
    assert run("merge", "some/name", adapter, out, "--scale", 0.5, "--no_also_train").code == 0
    expected, _ = load_base(base)
    disha.load_adapter(expected, adapter, also_train=False)
    disha.set_adapter_scale(expected, 0.5)
    disha.merge_adapters(expected, unload=True)
    assert_same(load_base(str(out))[0].state_dict(), expected.state_dict())


def test_another_base_that_is_a_name_is_refused_too(
    run, complaint, language_model, tmp_path, monkeypatch
):
    (other, words), out = load_base(str(language_model / "model")), tmp_path / "out"
    adapter = language_model / "adapter.safetensors"
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(2)
    monkeypatch.setattr("disha.finetune.base.load_base", lambda name, bits, **_: (other, words))
    assert "base" in complaint("merge", "some/name", adapter, out)
    disha.remove_adapters(other)
    assert run("merge", "some/name", adapter, out, "--force").code == 0


def noted(language_model, path, **notes):
    """Write an adapter of the language model with these notes, and rows for its new tokens."""
    base = language_model / "model"
    adapted, _ = load_base(str(base), notes=notes)
    rows = {"embed_tokens": [len(adapted.lm_head.weight) - 1]} if "new_tokens" in notes else None
    disha.inject_adapters(adapted, "q_proj", r=4, init="kaiming", also_train_rows=rows)
    disha.save_adapter(adapted, path, metadata=notes)
    return base, path


@pytest.mark.parametrize("notes", [{}, {"new_tokens": '["<new>"]'}], ids=["on disk", "loaded"])
@pytest.mark.parametrize("out", ["base", "base/inside", "."])
def test_a_base_is_never_overwritten(run, complaint, language_model, files, notes, out):
    model, adapter = noted(language_model, files.path / "a.safetensors", **notes)
    base = Path(shutil.copytree(model, files.path / "base"))
    before = {path: path.read_bytes() for path in base.iterdir()}
    assert "is there" in complaint("merge", base, adapter, files.path / out, "--overwrite")
    assert {path: path.read_bytes() for path in base.iterdir()} == before


def test_a_base_that_is_loaded_becomes_a_folder(complaint, language_model, files):
    new_tokens = '["<new>"]'
    base, adapter = noted(language_model, files.path / "a.safetensors", new_tokens=new_tokens)
    says = complaint("merge", base, adapter, files.path / "out.safetensors")
    assert "name a folder" in says


def test_the_end_of_answers_comes_along(run, language_model, tmp_path):
    base, adapter = noted(language_model, tmp_path / "a.safetensors", eos_token="<user>")
    assert run("merge", base, adapter, tmp_path / "out").code == 0
    found, words = load_base(str(tmp_path / "out"))
    assert words.eos_token == "<user>"
    assert words.eos_token_id in found.generation_config.eos_token_id
    assert found.generation_config.suppress_tokens  # of the base, which keeps its other settings


@pytest.mark.filterwarnings("default")
def test_a_file_of_weights_is_said_to_hold_no_template(run, language_model, tmp_path):
    notes = {"chat_template": "{{ messages }}", "eos_token": "<user>"}
    base, adapter = noted(language_model, tmp_path / "a.safetensors", **notes)
    out = tmp_path / "out.safetensors"
    done = run("merge", base / "model.safetensors", adapter, out)
    assert done.code == 0
    assert f"{out} has weights alone; for the chat_template and eos_token" in done.err


@pytest.mark.parametrize(
    ("notes", "says"),
    [
        ({"eos_token": "<other>"}, "'<other>', which is not a token of the base"),
        ({"base": '{"base_model_name_or_path": "./\\u001b[2J"}'}, r"\x1b[2J, which is not there"),
    ],
)
def test_notes_that_are_refused(run, language_model, tmp_path, notes, says):
    base = [] if "base" in notes else [language_model / "model"]
    adapted, _ = load_base(str(language_model / "model"))
    adapter = tmp_path / "a.safetensors"
    disha.save_adapter(disha.inject_adapters(adapted, "q_proj", 4), adapter, metadata=notes)
    done = run("merge", *base, adapter, tmp_path / "out")
    assert done.code == 2
    assert says in done.err


def test_a_name_of_a_base_moves_no_cursor(run, files):
    base = {"base_model_name_or_path": "x\x1b[2J"}
    done = run("merge", files.adapter(metadata={"base": json.dumps(base)}), files.path / "out")
    assert done.err.startswith(r"the base is x\x1b[2J, with")
    assert "\x1b" not in done.err


def test_a_file_without_a_note_needs_a_base(complaint, files):
    assert "notes no base that can be used; name it too" in complaint(
        "merge", files.adapter(), files.path / "out"
    )


def test_another_base_is_refused_unless_forced(run, complaint, files):
    base, adapter, out = files.base(), files.adapter(base=4), files.path / "out"
    assert "merge with `force`" in complaint("merge", base, adapter, out)
    assert run("merge", base, adapter, out, "--force").code == 0


def test_what_is_there_stays_unless_told(run, complaint, files):
    base, adapter, out = files.base(), files.adapter(), files.path / "out"
    assert run("merge", base, adapter, out).code == 0
    before = (out / "model.safetensors").read_bytes()
    assert "--overwrite" in complaint("merge", base, adapter, out, "--scale", 2)
    assert (out / "model.safetensors").read_bytes() == before
    assert run("merge", base, adapter, out, "--scale", 2, "--overwrite").code == 0
    assert (out / "model.safetensors").read_bytes() != before


@pytest.mark.parametrize(
    ("base", "adapter", "flags"),
    [
        ("absent", "a", ()),
        ("base", "absent", ()),
        ("a", "base/model.safetensors", ()),
        ("base", "a", ("--scale", "nan")),
    ],
)
def test_bad_input(complaint, files, base, adapter, flags):
    files.base()
    files.adapter("a")
    assert complaint("merge", files.path / base, files.path / adapter, files.path / "out", *flags)


def test_wrong_usage(complaint):
    assert "large" in complaint("merge", "base", "a", "out", "--scale", "large")


def test_a_tied_base_names_no_flag_that_gives_other_logits(complaint, files):
    torch.manual_seed(0)
    tied = nn.ModuleDict({"embed": nn.Embedding(12, 8), "q": nn.Linear(8, 8)})
    base, adapter = files.path / "base", files.path / "a.safetensors"
    base.mkdir()
    save_file(tied.state_dict(), base / "model.safetensors")
    (base / "config.json").write_text('{"tie_word_embeddings": true}')
    disha.save_adapter(disha.inject_adapters(tied, "embed", r=4, init="kaiming"), adapter)
    says = complaint("merge", base, adapter, files.path / "out")
    assert "force" not in says
    assert "merge_adapters(model, untie=True)" in says
