"""The adapter file alone is enough, where it notes its base."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import disha
from disha.finetune.models.checkpoint import open_model
from tests.cli.model_files import ADAPTER_FLAGS

PROMPT = ("--prompt", "say yellow 3")
SHORT = ("--max_seq_length", "96")
BASE_FLAG = "--base_model_name_or_path"


@pytest.fixture
def folder(models, tmp_path):
    """A folder of its own, with a copy of the model and of the adapter that notes it."""
    shutil.copytree(models / "model", tmp_path / "model")
    (tmp_path / "out").mkdir()
    shutil.copy(models / "adapter.safetensors", tmp_path / "model" / "adapter.safetensors")
    noted(tmp_path, {"base_model_name_or_path": "./../model", "bits": "fp32"})
    return tmp_path


def noted(folder, note, name="out/adapter.safetensors"):
    """Save the adapter again with another note."""
    model = open_model(folder / "model").load_model(torch.float32)
    disha.load_adapter(model, folder / "model" / "adapter.safetensors")
    text = note if isinstance(note, str) else json.dumps(note)
    disha.save_adapter(model, folder / name, metadata={} if note is None else {"base": text})
    return folder / name


def test_generate_and_evaluate_find_the_base(run, models, folder):
    adapter = folder / "out" / "adapter.safetensors"
    named = (BASE_FLAG, models / "model")
    for command in (
        ("generate", *PROMPT, "--json"),
        ("evaluate", "--data_path", models / "held_out.jsonl", "--max_seq_length", 96, "--json"),
    ):
        done = run(*command, "--adapter", adapter)
        assert done.code == 0, done.err
        assert done.json == run(*command, "--adapter", adapter, *named).json
        said = f"the base model is {folder / 'model'}, with --bits fp32, as {adapter} notes\n"
        assert done.err == said


def test_merge_finds_the_base(run, folder):
    adapter = folder / "out" / "adapter.safetensors"
    assert run("merge", adapter, folder / "merged").code == 0
    assert run("merge", folder / "model", adapter, folder / "by-name").code == 0
    found, expected = (
        load_file(folder / one / "model.safetensors") for one in ("merged", "by-name")
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_what_finetune_notes_is_found_wherever_both_are_moved(run, models, tmp_path, monkeypatch):
    first = tmp_path / "first"
    first.mkdir()
    shutil.copytree(models / "model", first / "model")
    monkeypatch.chdir(first)
    flags = (*ADAPTER_FLAGS, "--max_steps", "1", "--data_path", models / "train.jsonl")
    assert run("finetune", BASE_FLAG, "model", "--output_dir", "out/a", *flags).code == 0
    monkeypatch.chdir(tmp_path)
    (first).rename(tmp_path / "second")
    adapter = tmp_path / "second" / "out" / "a" / "adapter.safetensors"
    assert str(tmp_path) not in str(disha.inspect_adapter(adapter).metadata)
    done = run("generate", "--adapter", os.path.relpath(adapter), *PROMPT)
    assert done.code == 0, done.err
    assert "the base model is second/model, with" in done.err
    plain = run(
        *("finetune", BASE_FLAG, tmp_path / "second" / "model", "--note_base", "False"),
        *("--output_dir", tmp_path / "plain", *flags),
    )
    assert plain.code == 0, plain.err
    metadata = disha.inspect_adapter(tmp_path / "plain" / "adapter.safetensors").metadata
    assert metadata.keys() == {"base_model", "template"}


def test_bits_and_tokenizer_are_noted_and_flags_replace_them(run, models, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for file in (models / "model").glob("tokenizer*"):
        shutil.copy(file, tokenizer)
    flags = (*ADAPTER_FLAGS, "--max_steps", "1", "--data_path", models / "train.jsonl")
    flags = (*flags, "--bits", "bf16", "--tokenizer", tokenizer, "--output_dir", tmp_path / "out")
    assert run("finetune", BASE_FLAG, models / "model", *flags).code == 0
    adapter = tmp_path / "out" / "adapter.safetensors"
    done = run("generate", "--adapter", adapter, *PROMPT)
    assert (done.code, "with --bits bf16" in done.err) == (0, True)
    shutil.rmtree(tokenizer)
    gone = run("generate", "--adapter", adapter, *PROMPT)
    assert gone.code == 2
    assert "as --tokenizer, but there is no file or folder" in gone.complaint


@pytest.mark.parametrize("command", ["generate", "evaluate", "merge", "finetune"])
def test_a_base_that_is_gone_is_named(run, models, folder, command):
    (folder / "model").rename(folder / "elsewhere")
    adapter = folder / "out" / "adapter.safetensors"
    done = run(*words(command, adapter, models, folder))
    assert done.code == 2
    assert (
        f"there is no file or folder {folder / 'model'}; name the base yourself" in done.complaint
    )


@pytest.mark.parametrize("command", ["generate", "evaluate", "merge", "finetune"])
def test_another_base_in_its_place_is_refused(run, models, folder, command):
    path = folder / "model" / "model.safetensors"
    weights = {name: value + 0.5 for name, value in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    adapter = folder / "out" / "adapter.safetensors"
    done = run(*words(command, adapter, models, folder))
    assert done.code == 2
    complaint = done.err.splitlines()[-1]
    assert re.search("other base weights|14 from another base", complaint), complaint
    assert not (folder / "result").exists()


def words(command, adapter, models, folder):
    more = {
        "generate": ("--adapter", adapter, *PROMPT),
        "evaluate": ("--adapter", adapter, "--data_path", models / "held_out.jsonl", *SHORT),
        "merge": (adapter, folder / "result"),
        "finetune": (
            *("--adapter", adapter, "--data_path", models / "train.jsonl"),
            *("--output_dir", folder / "result", *SHORT),
        ),
    }
    return (command, *more[command])


# --- notes of strangers --------------------------------------------------------------------------


def test_no_function_is_called_by_a_note(run, folder, monkeypatch):
    code = folder / "stranger.py"
    code.write_text("raise AssertionError('this was run')")
    monkeypatch.chdir(folder)
    adapter = noted(folder, {"model": "stranger:make", "bits": "fp32"})
    done = run("generate", "--adapter", adapter, *PROMPT)
    assert done.code == 2
    assert "give --model 'stranger:make' if you trust it" in done.complaint
    assert "stranger" not in sys.modules


@pytest.mark.parametrize(
    "path",
    [
        "/etc",
        "~/model",
        "..",
        "./a\\..\\b",
        "\\\\host\\share",
        "//host/share",
        "https://host/model",
        "C:/model",
        "./" + "../" * 40 + "net/host/model",
        "./" + "../" * 40 + "proc/self/cwd",
        "./" + "../" * 40 + "dev/zero",
        "./\n",
        "./" + "a/" * 1000,
        "",
        "a/b/c",
    ],
)
def test_paths_of_strangers_lead_nowhere(run, folder, path):
    for flag in ("base_model_name_or_path", "tokenizer"):
        note = {"base_model_name_or_path": "./../model", flag: path}
        done = run("generate", "--adapter", noted(folder, note), *PROMPT)
        assert done.code == 2
        assert f"as --{flag}, which is neither a path from its folder nor a name" in done.complaint


@pytest.mark.parametrize(
    "note",
    [
        *("", "{", "[]", "3", "[" * 100_000, '{"base_model_name_or_path": 3}'),
        *({"bits": "5"}, {"base_model_name_or_path": "./../model", "trust_remote_code": "True"}),
    ],
)
def test_notes_of_strangers_that_make_no_sense(run, folder, note):
    done = run("generate", "--adapter", noted(folder, note), *PROMPT)
    assert done.code == 2
    assert "has a note of its base that can't be used" in done.complaint


def test_a_pipe_is_no_model(run, folder):
    os.mkfifo(folder / "pipe")
    adapter = noted(folder, {"base_model_name_or_path": "./../pipe"})
    done = run("generate", "--adapter", adapter, *PROMPT)
    assert done.code == 2
    assert f"no file or folder {folder / 'pipe'}" in done.complaint


def test_without_a_note_the_base_must_be_named(run, folder):
    adapter = noted(folder, None)
    assert "--base_model_name_or_path" in run("generate", "--adapter", adapter, *PROMPT).complaint
    done = run("merge", adapter, folder / "merged")
    assert done.code == 2
    assert f"{adapter} does not note its base; give it first" in done.complaint


@pytest.mark.parametrize("count", [0, 1, 4])
def test_merge_takes_two_or_three_paths(run, folder, count):
    done = run("merge", *[folder / str(number) for number in range(count)])
    assert done.code == 2
    assert f"takes [BASE] ADAPTER OUT, got {count} paths" in done.complaint
