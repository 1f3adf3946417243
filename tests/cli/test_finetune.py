"""``disha finetune``: from words to settings. What a run does is tested beside its code."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from disha.cli.finetune import run as run_finetune
from disha.cli.finetune import settings_from
from disha.errors import ArgumentError
from disha.finetune.errors import PeerError
from disha.finetune.settings import DEMO_SETTINGS, FinetuneSettings
from tests.finetune.command_line import with_values

UPSTREAM = """
    --base_model_name_or_path meta-llama/Llama-2-7b-hf
    --output_dir output/bone-llama2-7b
    --bone_r 64
    --init_weights True
    --bits bf16
    --data_path meta-math/MetaMathQA
    --dataset_split 'train[:100000]'
    --dataset_field query response
    --bf16 True
    --num_train_epochs 1
    --per_device_train_batch_size 2
    --gradient_accumulation_steps 8
    --save_strategy steps
    --save_steps 1000
    --save_total_limit 1
    --logging_steps 1
    --learning_rate 2e-5
    --weight_decay 0.
    --warmup_ratio 0.03
    --tf32 True
    --report_to none
"""
MEANT = with_values(
    FinetuneSettings(),
    base_model_name_or_path=Path("meta-llama/Llama-2-7b-hf"),
    output_dir=Path("output/bone-llama2-7b"),
    bone_r=64,
    init_weights="True",
    bits="bf16",
    data_path=(Path("meta-math/MetaMathQA"),),
    dataset_split=("train[:100000]",),
    dataset_field=("query", "response"),
    bf16=True,
    num_train_epochs=1.0,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=8,
    save_strategy="steps",
    save_steps=1000,
    save_total_limit=1,
    logging_steps=1,
    learning_rate=2e-5,
    weight_decay=0.0,
    warmup_ratio=0.03,
    tf32=True,
    report_to="none",
)
SWITCHES = sorted(name for name, value in FinetuneSettings().to_json().items() if value is False)


def test_upstreams_command_means_what_it_says():
    assert settings_from(shlex.split(UPSTREAM)) == MEANT


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_stands_alone_or_has_a_word(name):
    plain = DEMO_SETTINGS if name == "demo" else FinetuneSettings()
    for words in (["True"], [], ["true"], ["yes"], ["1"]):
        assert settings_from([f"--{name}", *words]) == with_values(plain, **{name: True})
    for word in ("False", "false", "no", "0"):
        assert settings_from([f"--{name}", word]) == FinetuneSettings()


def test_a_switch_alone_leaves_what_follows(tmp_path):
    given = settings_from(["--packing", "--bone_r", "8", "--bf16"])
    assert (given.data.packing, given.adapter.bone_r, given.training.bf16) == (True, 8, True)


@pytest.mark.parametrize("words", ["--bf16 maybe", "--bone_r 1.5", "--init_weights miss", "--x"])
def test_what_is_not_understood_is_exit_code_2(run, words):
    done = run("finetune", *words.split())
    assert done.code == 2
    assert words.split()[-1] in done.complaint


def test_the_demo_has_defaults_of_its_own_and_flags_take_their_place():
    assert settings_from(["--demo"]) == DEMO_SETTINGS
    changed = with_values(DEMO_SETTINGS, max_steps=3, output_dir=Path("elsewhere"))
    assert settings_from(["--max_steps", "3", "--demo", "--output_dir", "elsewhere"]) == changed


def test_short_names_mean_the_long_ones(tmp_path):
    short = "--base m --data d --output o --r 8 --lr 1e-3 --epochs 2 --batch-size 3"
    long = (
        "--base_model_name_or_path m --data_path d --output_dir o --bone_r 8 --learning_rate 1e-3 "
        "--num_train_epochs 2 --per-device-train-batch-size 3"
    )
    given = settings_from(short.split())
    assert given == settings_from(long.split()) != FinetuneSettings()
    assert settings_from([*short.split(), "--learning_rate", "1"]).training.learning_rate == 1
    path = tmp_path / "run.yaml"
    path.write_text("base: m\ndata: d\noutput: o\nr: 8\nlr: 1e-3\nepochs: 2\nbatch-size: 3\n")
    assert settings_from(["--config", str(path)]) == with_values(given, config=path)


# --- flags from a file ---------------------------------------------------------------------------


FILES = {
    "run.yaml": """
bone_r: 32
learning-rate: 1e-3
dataset_field: [a, b]
bf16: true
bits: 4
init_weights: True
eval_path:
""",
    "run.toml": """
bone_r = 32
learning-rate = 1e-3
dataset_field = ["a", "b"]
bf16 = true
bits = 4
init_weights = true
""",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_gives_flags_and_those_given_besides_take_precedence(tmp_path, name):
    path = tmp_path / name
    path.write_text(FILES[name])
    config = ["--config", str(path)]
    given = settings_from(config)
    assert given == with_values(
        FinetuneSettings(),
        config=path,
        bone_r=32,
        learning_rate=1e-3,
        dataset_field=("a", "b"),
        bf16=True,
        bits="4",
    )
    others = ["--learning_rate", "2e-5", "--bf16", "False", "--dataset_field", "text"]
    changed = with_values(given, learning_rate=2e-5, bf16=False, dataset_field=("text",))
    assert settings_from([*config, *others]) == changed
    assert settings_from([*others, *config]) == changed


def test_a_file_can_ask_for_the_demo(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("demo = true\nmax_steps = 2\n")
    assert settings_from(["--config", str(path)]) == with_values(
        DEMO_SETTINGS, config=path, max_steps=2
    )
    plain = with_values(FinetuneSettings(), config=path, max_steps=2)
    assert settings_from(["--config", str(path), "--demo", "False"]) == plain


def test_the_settings_of_a_report_are_a_file_of_flags(tmp_path):
    import yaml

    path = tmp_path / "run.yaml"
    settings = {name: value for name, value in MEANT.to_json().items() if name != "config"}
    path.write_text(yaml.safe_dump(settings | {"dataset_field": ["query", "response"]}))
    assert settings_from(["--config", str(path)]) == with_values(MEANT, config=path)


@pytest.mark.parametrize("name", ["run.yaml", "run.yml", "RUN.YAML", "run.toml"])
def test_an_empty_file_changes_nothing(tmp_path, name):
    path = tmp_path / name
    path.write_text("# nothing\n")
    assert settings_from(["--config", str(path)]) == with_values(FinetuneSettings(), config=path)


@pytest.mark.parametrize("text", ["2e-5", "2.e-5", "2E-5", "+2e-5", "0.00002"])
def test_numbers_of_yaml_are_what_everybody_means(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(f"learning-rate: {text}\ntarget: null\n")
    expected = with_values(FinetuneSettings(), config=path, learning_rate=2e-5)
    assert settings_from(["--config", str(path)]) == expected


@pytest.mark.parametrize(
    ("text", "name", "complaint"),
    [
        ("bone_rr: 4", "run.yaml", "'bone_rr', which is not a flag; did you mean bone_r?"),
        ("zzz: 4", "run.yaml", "'zzz', which is not a flag$"),
        ("1: 4", "run.yaml", "'1', which is not a flag"),
        ("training:\n  bone_r: 4", "run.yaml", "'training', which is not a flag"),
        ("config: other.yaml", "run.yaml", "'config', which is not a flag"),
        ("bone_r:\n  a: 4", "run.yaml", "bone_r must be a text, a number, true or false, or a"),
        ("dataset_field: [[a]]", "run.yaml", r"dataset_field must be a text, .* got \[\['a'\]\]"),
        ("target: 2024-01-01", "run.yaml", "target must be a text"),
        ("target: [q_proj, v_proj]", "run.yaml", "target must be one value, got the list"),
        ("packing: []", "run.yaml", r"packing must be one value, got the list \[\]"),
        ("- bone_r", "run.yaml", "must hold flags by their names, as in `bone_r: 64`, got list"),
        ("bone_r", "run.yaml", "must hold flags by their names, .* got str"),
        ("bone_r: [", "run.yaml", "is not YAML: "),
        ("a: !!python/object/apply:os.getcwd []", "run.yaml", "is not YAML: "),
        ("bone_r: \x00", "run.yaml", "is not YAML: "),
        ("bone_r 64", "run.toml", "is not TOML: "),
        (b"\xff", "run.yaml", "is not UTF-8 text"),
        ("bone_r: 4\nbits: 8\nbone_r: 8", "run.yaml", "is not YAML: 'bone_r' comes twice"),
        ("bone_r: 4\nbone-r: 8", "run.yaml", "holds bone_r twice; leave one of them out"),
        ("lr: 4\nlearning_rate: 8", "run.yaml", "holds learning_rate twice; leave one of them"),
        ("lora_rank: 4", "run.yaml", "'lora_rank', which is not a flag; did you mean r?"),
        ("bone_r: 4", "run.json", "must end with .yaml, .yml or .toml"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(tmp_path, text, name, complaint):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ArgumentError, match=complaint) as caught:
        settings_from(["--config", str(path)])
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "complaint"), [("absent.yaml", "No such file"), ("folder.yaml", "it is a folder")]
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, complaint):
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ArgumentError, match=f"can't read .*{name}: {complaint}"):
        settings_from(["--config", str(tmp_path / name)])


@pytest.mark.parametrize(
    ("text", "complaint"), [("bone_r: many", "'many'"), ("bits: 7", "'7'"), ("bone_r: [1, 2]", "2")]
)
def test_a_wrong_value_in_a_file_is_wrong_usage(run, tmp_path, text, complaint):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    done = run("finetune", "--config", path)
    assert done.code == 2
    assert complaint in done.complaint


@pytest.mark.parametrize(
    ("text", "words", "shown"),
    [
        ("debug: true", [], True),
        ("debug: false", ["--debug"], True),
        ("debug: true", ["--debug", "False"], False),
        ("bone_r: 8", ["--debug", "no"], False),
    ],
)
def test_debug_has_the_value_that_the_flag_or_the_file_gives(run, tmp_path, text, words, shown):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    done = run("finetune", "--config", path, *words)
    assert done.code == 2
    assert ("Traceback" in done.err) is shown
    assert "--base_model_name_or_path path/to/model is missing" in done.err


def test_a_no_of_yaml_is_a_no(tmp_path):
    """PyYAML reads it as false."""
    path = tmp_path / "run.yaml"
    path.write_text("save_strategy: no\npacking: no\ninit_weights: yes\n")
    given = settings_from(["--config", str(path)])
    assert (given.output.save_strategy, given.data.packing) == ("no", False)
    assert given.adapter.init_weights == "True"


# --- several processes ---------------------------------------------------------------------------


def test_the_failure_of_another_process_is_told_there(run, monkeypatch):
    def fail(settings):
        raise PeerError("rank 1 failed")

    monkeypatch.setattr("disha.finetune.command.finetune", fail)
    monkeypatch.setattr(FinetuneSettings, "check", lambda settings: None)
    done = run("finetune")
    assert (done.code, done.out, done.err) == (1, "", "")
    with pytest.raises(SystemExit):
        run_finetune([])
