from __future__ import annotations

from pathlib import Path

import pytest

import disha
from disha.cli.finetune import settings_from
from disha.finetune.errors import SettingsError
from disha.finetune.settings import DEMO_SETTINGS, FinetuneSettings
from tests.finetune.command_line import with_values


@pytest.fixture
def good(tmp_path, tiny_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"query": "a", "response": "b"}\n')
    return with_values(
        FinetuneSettings(),
        base_model_name_or_path=tiny_path,
        output_dir=tmp_path / "out",
        data_path=(data,),
    )


ANSWERS = {
    "load_best_model_at_end": True,
    "metric_for_best_model": "exact_match",
    "eval_fraction": 0.1,
    "eval_steps": 5,
}


def test_good_settings_pass_and_touch_nothing(good):
    good.check()
    assert not good.output.output.exists()


PAIRS = "--rank_pattern must be pairs regex=r, such as v_proj=16 mlp=32, got "


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
        ({"load_best_model_at_end": True}, "--load_best_model_at_end compares measurements of"),
        ({"early_stopping_patience": 2}, "--early_stopping_patience compares measurements of"),
        (
            {"early_stopping_patience": 2, "eval_fraction": 0.1},
            "--early_stopping_patience compares measurements of",
        ),
        ({"early_stopping_patience": 0}, "--early_stopping_patience must be at least 1"),
        ({"metric_for_best_model": "perplexity"}, "--metric_for_best_model says what is best"),
        (
            {**ANSWERS, "dataset_field": ("text",)},
            "--metric_for_best_model exact_match compares with",
        ),
        ({**ANSWERS, "strategy": "fsdp"}, "--metric_for_best_model exact_match does not go"),
        ({"max_steps": 0}, "--max_steps must be at least 1, or -1"),
        ({"max_steps": -2}, "--max_steps must be at least 1, or -1"),
        ({"max_seq_length": 1}, "--max_seq_length must be at least 2"),
        ({"seed": -1}, "--seed must be from 0"),
        ({"base_model_name_or_path": None}, "--base_model_name_or_path path/to/model is missing"),
        ({"output_dir": None}, "--output_dir FOLDER is missing"),
        ({"data_path": ()}, "--data_path rows.jsonl is missing"),
        ({"data_path": (Path("absent.jsonl"),)}, "--data_path absent.jsonl does not exist"),
        ({"eval_path": Path("absent.jsonl")}, "--eval_path absent.jsonl does not exist"),
        ({"demo": True}, "--data_path does not go with --demo"),
        ({"dataset_field": ("query", "query")}, "--dataset_field needs two different fields"),
        ({"dataset_field": ("a", "b", "c")}, "--dataset_field must be one or two names, got a b c"),
        (
            {"dataset_field": ("text",), "template": "Q: {query} A:"},
            "--template is the text around a query, but --dataset_field names one field",
        ),
        ({"data_weights": (1.0, 2.0)}, "--data_weights must be one number for each of 1 data set"),
        ({"data_weights": (-1.0,)}, "--data_weights must be at least 0, got -1"),
        ({"data_weights": (float("nan"),)}, "--data_weights must be at least 0, got nan"),
        ({"data_weights": (0.0,)}, "--data_weights must not all be 0, and their sum must be"),
        ({"dataset_split": ("a", "b")}, "--dataset_split must be one split, or one for each of 1"),
        ({"dataset_field": ()}, "--dataset_field must be one or two names"),
        ({"dataloader_num_workers": -1}, "--dataloader_num_workers must be at least 0, got -1"),
        ({"save_steps": 0}, "--save_steps must be at least 1, got 0"),
        ({"save_total_limit": 0}, "--save_total_limit must be at least 1, got 0"),
        ({"resume": True, "overwrite_output_dir": True}, "--resume continues from checkpoints"),
        ({"adapter_dropout": 1.0}, "--adapter_dropout must be at least 0 and less than 1, got 1.0"),
        ({"bone_r_out": 0}, "--bone_r_out must be at least 1, got 0"),
        ({"bone_r_out": 8, "init_weights": "bat"}, "--bone_r_out does not go with --method bat"),
        ({"init_weights": "bat", "method": "bone"}, "--init_weights bat and --method bone"),
        ({"target": "("}, "--target must be a regular expression, got '('"),
        ({"exclude": "["}, "--exclude must be a regular expression, got '['"),
        ({"rank_pattern": ("(=8",)}, "--rank_pattern must be a regular expression, got '('"),
        (
            {"rank_pattern": ("a",)},
            PAIRS + "'a'",
        ),
        (
            {"rank_pattern": ("a=0",)},
            PAIRS + "'a=0'",
        ),
        (
            {"rank_pattern": ("=2",)},
            PAIRS + "'=2'",
        ),
        (
            {"rank_pattern": ("a=1.5",)},
            PAIRS + "'a=1.5'",
        ),
        (
            {"rank_pattern": ("a=1", "a=2")},
            PAIRS + "'a=2'",
        ),
        ({"method": "lora"}, "--method: unknown method 'lora'; allowed are 'bone', 'bat'"),
        ({"also_train": "["}, "--also_train must be a regular expression, got '['"),
        ({"model": "m:f"}, "--model and --base_model_name_or_path both say where"),
        *(
            ({"base_model_name_or_path": None, "model": model}, "--model must be module:function")
            for model in ("", "m", ":f", "m:", ".m:f")
        ),
        ({"base_model_name_or_path": Path("absent")}, "--base_model_name_or_path absent does not"),
        (
            {"base_model_name_or_path": None, "model": "m:f", "bits": "8"},
            "--bits 8 quantises models",
        ),
        (
            {"optimizer": "adafactor", "strategy": "fsdp"},
            "--optimizer adafactor does not go with --strategy fsdp",
        ),
        ({"bits": "4", "strategy": "fsdp"}, "--bits 4 does not go with --strategy fsdp"),
    ],
)
def test_bad_settings_are_named(good, changes, complaint):
    with pytest.raises(SettingsError) as caught:
        with_values(good, **changes).check()
    assert str(caught.value).startswith(complaint)
    assert isinstance(caught.value, disha.DishaError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("other", [{"eval_path": Path()}, {"eval_split": "test"}])
def test_two_ways_to_hold_out_contradict(good, other):
    [name] = other
    with pytest.raises(SettingsError, match=f"--{name} and --eval_fraction .* give one of them"):
        with_values(good, eval_fraction=0.1, **other).check()


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset_field": ("a", "b")},
        {"dataset_split": ("train[:5]",)},
        {"eval_fraction": 0.5},
        {"eval_split": "test"},
        {"streaming": True},
    ],
)
def test_what_says_where_rows_are_does_not_go_with_the_demo(changes):
    [name] = changes
    with pytest.raises(SettingsError, match=f"--{name} does not go with --demo"):
        with_values(DEMO_SETTINGS, **changes).check()


def test_the_demo_may_have_another_model(tmp_path, tiny_path):
    output = tmp_path / "out"
    with_values(DEMO_SETTINGS, base_model_name_or_path=tiny_path, output_dir=output).check()
    with pytest.raises(SettingsError, match="absent does not exist"):
        with_values(
            DEMO_SETTINGS, base_model_name_or_path=Path("absent"), output_dir=output
        ).check()


def test_a_folder_of_rows_is_as_good_as_a_file(good, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    with_values(good, data_path=(folder,), eval_path=folder).check()


def test_a_file_where_the_output_folder_should_be(good, tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("mine")
    for folder in (taken, taken / "deeper" / "still"):
        with pytest.raises(SettingsError, match=r"can't be a folder, because .*taken is a file"):
            with_values(good, output_dir=folder).check()
    assert taken.read_text() == "mine"


def test_an_output_folder_without_the_right_to_write(good, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(SettingsError, match="can't be written: no permission for"):
        good.check()


EVERYTHING = {
    "base_model_name_or_path": Path("m.gguf"),
    "tokenizer": Path("tokenizer.json"),
    "bits": "bf16",
    "bone_r": 32,
    "init_weights": "bat",
    "method": "bat",
    "bone_r_out": 16,
    "target": "q_proj",
    "exclude": "mlp",
    "rank_pattern": ("v_proj=8", "o_proj=4"),
    "also_train": "norm",
    "adapter_dropout": 0.1,
    "data_path": (Path("d.jsonl"), Path("d.csv")),
    "dataset_split": ("train[:100000]",),
    "dataset_field": ("instruction", "output"),
    "template": "Q: {query}\\nA: ",
    "data_weights": (2.0, 1.5),
    "eval_path": Path("e.jsonl"),
    "eval_split": "test[:10%]",
    "eval_fraction": 0.1,
    "max_seq_length": 99,
    "packing": True,
    "group_by_length": False,
    "streaming": True,
    "dataloader_num_workers": 2,
    "skip_bad_rows": True,
    "num_train_epochs": 2.0,
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "optimizer": "sgd",
    "learning_rate": 2e-5,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.05,
    "weight_decay": 0.25,
    "max_grad_norm": 2.0,
    "seed": 5,
    "bf16": True,
    "tf32": True,
    "gradient_checkpointing": True,
    "compile": True,
    "strategy": "fsdp",
    "load_best_model_at_end": True,
    "early_stopping_patience": 3,
    "metric_for_best_model": "perplexity",
    "output_dir": Path("out"),
    "logging_steps": 2,
    "eval_steps": 4,
    "save_strategy": "steps",
    "save_steps": 7,
    "save_total_limit": 1,
    "report_to": "tensorboard",
    "samples": 1,
    "resume": True,
    "overwrite_output_dir": True,
    "merge": True,
    "verify": True,
    "note_base": False,
    "dry_run": True,
    "debug": True,
}
"""Another value than the default for every flag, but for those that say where others are from."""


def words(**values):
    given = []
    for name, value in values.items():
        several = value if isinstance(value, tuple) else (value,)
        given += [f"--{name}", *map(str, several)]
    return given


def test_every_flag_is_here():
    elsewhere = {"model", "adapter", "config", "demo"}
    assert EVERYTHING.keys() | elsewhere == FinetuneSettings().to_json().keys()
    plain = FinetuneSettings().to_json()
    assert all(str(value) != str(plain[name]) for name, value in EVERYTHING.items())


def test_every_flag_is_spelled_with_underscores_or_dashes():
    underscored = words(**EVERYTHING)
    dashed = [part.replace("_", "-") if part[:2] == "--" else part for part in underscored]
    expected = with_values(FinetuneSettings(), **EVERYTHING)
    assert settings_from(underscored) == expected
    assert settings_from(dashed) == expected


@pytest.mark.parametrize(
    ("given", "method", "title"),
    [
        (["--init_weights", "True"], "bone", "Bone"),
        (["--init_weights", "bat"], "bat", "BAT"),
        (["--method", "bat"], "bat", "BAT"),
        (["--init_weights", "True", "--method", "bone"], "bone", "Bone"),
        (["--bone_r_out", "8"], "bone", "Bone (tile)"),
    ],
)
def test_init_weights_or_method_names_the_method(given, method, title):
    adapter = settings_from(given).adapter
    assert (adapter.method_name, adapter.title) == (method, title)
