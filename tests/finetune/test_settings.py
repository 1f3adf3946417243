from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import disha
from disha.finetune.command import parse
from disha.finetune.errors import CheckpointError, SettingsError
from disha.finetune.settings.run import DEMO_SETTINGS, FinetuneSettings


@pytest.fixture
def good(tmp_path, tiny_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"query": "a", "response": "b"}\n')
    return FinetuneSettings(
        base_model_name_or_path=tiny_path, output_dir=tmp_path / "out", data_path=data
    )


def test_good_settings_pass_and_touch_nothing(good):
    good.check()
    assert not good.output.exists()


def test_a_folder_where_a_file_is_to_be_written_is_found_before_training(good):
    (good.output / "adapter.safetensors").mkdir(parents=True)
    with pytest.raises(SettingsError, match=r"has a folder adapter.safetensors"):
        good.check()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"bone_r": 0}, "--bone_r must be at least 1, got 0"),
        ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size must be at least 1"),
        ({"gradient_accumulation_steps": -1}, "--gradient_accumulation_steps must be at least 1"),
        ({"logging_steps": 0}, "--logging_steps must be at least 1"),
        ({"learning_rate": 0.0}, "--learning_rate must be greater than 0, got 0.0"),
        ({"learning_rate": float("nan")}, "--learning_rate must be greater than 0, got nan"),
        ({"num_train_epochs": float("inf")}, "--num_train_epochs must be greater than 0, got inf"),
        ({"weight_decay": -0.1}, "--weight_decay must be at least 0"),
        ({"max_grad_norm": -1.0}, "--max_grad_norm must be at least 0"),
        ({"warmup_ratio": 1.0}, "--warmup_ratio must be at least 0 and less than 1"),
        ({"eval_fraction": 1.5}, "--eval_fraction must be at least 0 and less than 1"),
        ({"eval_steps": -5}, "--eval_steps must be at least 0"),
        ({"eval_steps": 5}, "--eval_steps needs rows to measure on"),
        ({"max_steps": 0}, "--max_steps must be at least 1, or -1"),
        ({"max_steps": -2}, "--max_steps must be at least 1, or -1"),
        ({"max_seq_length": 1}, "--max_seq_length must be at least 2"),
        ({"seed": -1}, "--seed must be from 0"),
        ({"base_model_name_or_path": None}, "--base_model_name_or_path model.gguf is missing"),
        ({"output_dir": None}, "--output_dir FOLDER is missing"),
        ({"data_path": None}, "--data_path rows.jsonl is missing"),
        ({"data_path": Path("absent.jsonl")}, "--data_path absent.jsonl does not exist"),
        ({"data_path": Path(".")}, "--data_path . is a folder"),
        ({"eval_path": Path("absent.jsonl")}, "--eval_path absent.jsonl does not exist"),
        ({"demo": True}, "--data_path does not go with --demo"),
        ({"dataset_field": ("query", "query")}, "--dataset_field needs two different fields"),
    ],
)
def test_bad_settings_are_named(good, changes, complaint):
    with pytest.raises(SettingsError) as caught:
        replace(good, **changes).check()
    assert str(caught.value).startswith(complaint)
    assert isinstance(caught.value, disha.DishaError)
    assert isinstance(caught.value, ValueError)


def test_two_ways_to_hold_out_contradict(good):
    settings = replace(good, eval_path=good.data, eval_fraction=0.1)
    with pytest.raises(SettingsError, match="give one of them"):
        settings.check()


def test_fields_do_not_go_with_the_demo():
    with pytest.raises(SettingsError, match="--dataset_field does not go with --demo"):
        replace(DEMO_SETTINGS, dataset_field=("a", "b")).check()


def test_a_folder_as_model_is_named(good, tmp_path):
    with pytest.raises(CheckpointError, match="is a folder; the base model must be one GGUF file"):
        replace(good, base_model_name_or_path=tmp_path).check()


def test_a_file_where_the_output_folder_should_be(good, tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("mine")
    for folder in (taken, taken / "deeper" / "still"):
        with pytest.raises(SettingsError, match=r"can't be a folder, as .*taken is a file"):
            replace(good, output_dir=folder).check()
    assert taken.read_text() == "mine"


def test_an_output_folder_without_the_right_to_write(good, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(SettingsError, match="can't be written: no right to"):
        good.check()


@pytest.mark.parametrize("settings", [FinetuneSettings(), DEMO_SETTINGS])
def test_settings_come_back_from_json(settings):
    text = json.dumps(settings.to_json())
    assert FinetuneSettings.from_json(json.loads(text)) == settings


def test_upstreams_spelling_with_underscores_or_dashes():
    values = {
        "base_model_name_or_path": "m.gguf",
        "output_dir": "out",
        "bone_r": "32",
        "init_weights": "bat",
        "bits": "bf16",
        "data_path": "d.jsonl",
        "num_train_epochs": "2",
        "per_device_train_batch_size": "2",
        "gradient_accumulation_steps": "8",
        "logging_steps": "1",
        "learning_rate": "2e-5",
        "weight_decay": "0.",
        "warmup_ratio": "0.05",
        "max_steps": "3",
        "max_seq_length": "99",
        "max_grad_norm": "2",
        "eval_fraction": ".1",
        "eval_steps": "4",
        "seed": "5",
        "target": "q_proj",
    }
    underscored = [part for name, value in values.items() for part in (f"--{name}", value)]
    dashed = [part.replace("_", "-") if part[:2] == "--" else part for part in underscored]
    fields = ["--dataset_field", "instruction", "output"]
    expected = FinetuneSettings(
        base_model_name_or_path=Path("m.gguf"),
        output_dir=Path("out"),
        bone_r=32,
        init_weights="bat",
        bits="bf16",
        data_path=Path("d.jsonl"),
        dataset_field=("instruction", "output"),
        num_train_epochs=2.0,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=8,
        logging_steps=1,
        learning_rate=2e-5,
        weight_decay=0.0,
        warmup_ratio=0.05,
        max_steps=3,
        max_seq_length=99,
        max_grad_norm=2.0,
        eval_fraction=0.1,
        eval_steps=4,
        seed=5,
        target="q_proj",
    )
    assert parse([*underscored, *fields]) == expected
    assert parse([*dashed, *fields]) == expected


def test_init_weights_names_the_method():
    assert parse(["--init_weights", "True"]).method == "bone"
    assert parse(["--init_weights", "bat"]).method == "bat"


def test_the_demo_has_defaults_of_its_own_that_flags_replace():
    assert parse(["--demo"]) == DEMO_SETTINGS
    changed = parse(["--max_steps", "3", "--demo", "--output_dir", "x"])
    assert changed == replace(DEMO_SETTINGS, max_steps=3, output_dir=Path("x"))
