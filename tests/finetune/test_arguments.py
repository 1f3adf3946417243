import pytest
import yaml
from torch import nn

import disha
from disha import ArgumentError
from disha.finetune.arguments import SHOWN, parse_flags
from disha.finetune.names import translate

AUTHORS = """--base_model_name_or_path model --output_dir output/bone --bone_r 32 --init_weights bat
--bits bf16 --data_path meta-math/MetaMathQA --dataset_split train[:100000]
--dataset_field query response --bf16 True --num_train_epochs 1 --per_device_train_batch_size 2
--gradient_accumulation_steps 8 --save_strategy steps --save_steps 1000 --save_total_limit 1
--logging_steps 1 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --tf32 True
--report_to none"""


def parse(words):
    return parse_flags(translate(words)[0])


def test_the_authors_command_line(monkeypatch):
    monkeypatch.setattr("disha.finetune.arguments.is_torch_tf32_available", lambda: False)
    with pytest.warns(match="--tf32 does nothing"):
        adapter, data, training = parse(AUTHORS.split())
    assert (adapter.base, adapter.r, adapter.method, adapter.bits) == ("model", 32, "bat", "bf16")
    assert data.data == ["meta-math/MetaMathQA"]
    assert data.dataset_field == ["query", "response"]
    assert training.warmup_steps == 0.03
    assert training.save_steps == 1000
    assert training.bf16
    assert training.tf32 is None


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--lr 0.5", "learning_rate", 0.5),
        ("--epochs=2", "num_train_epochs", 2.0),
        ("--batch-size 3", "per_device_train_batch_size", 3),
        ("--max_seq_length 7", "max_length", 7),
        ("--per-device-train-batch-size 3", "per_device_train_batch_size", 3),
        ("--gradient_checkpointing", "gradient_checkpointing", True),
        ("--activation_checkpointing", "gradient_checkpointing", True),
    ],
)
def test_other_names_of_flags(words, name, value):
    assert getattr(parse(words.split())[2], name) == value


@pytest.mark.parametrize(
    "name", ["fp16", "gradient_checkpointing", "assistant_only_loss", "completion_only_loss"]
)
def test_a_flag_that_is_true_or_false_needs_no_value(name):
    assert getattr(parse_flags([f"--{name}"])[2], name) is True
    assert getattr(parse_flags([f"--{name}", "False"])[2], name) is False


@pytest.mark.parametrize(
    ("groups", "method"), [("1", "bone"), ("3", "bone_groups3"), ("all", "bone_groups_all")]
)
def test_groups_of_shards(groups, method):
    adapter, _, _ = parse(["--groups", groups, "--method", "miss"])
    plan = disha.plan_adapters(nn.Sequential(nn.Linear(128, 128)), **adapter.settings())
    assert plan.config.method == method


def test_a_file_of_flags_and_the_command_line_wins(tmp_path):
    path = tmp_path / "run.yaml"
    flags = {"bone_r": 16, "data": ["a.json", "b.json"], "lr": 0.5, "bf16": False, "base": None}
    path.write_text(yaml.safe_dump(flags | {"exclude": [], "dataset_text_field": "body"}))
    adapter, data, training = parse(["--learning_rate", "0.1", "--config", str(path)])
    assert (adapter.r, data.data, training.learning_rate) == (16, ["a.json", "b.json"], 0.1)
    assert (adapter.base, adapter.exclude, data.dataset_field) == (None, [], ["body"])
    assert parse([f"--config={path}"])[0].r == 16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--bits 3", "invalid choice: '3'"),
        ("--r many", "--r must be a number, got many"),
        ("--r_out many", "invalid int value: 'many'"),
        ("--config", "name the file of --config"),
        ("--lr_scheduler_type nope", "nope is not a valid SchedulerType"),
        ("--eval_fraction 0.5 --eval_split test", "leave one out"),
    ],
)
def test_wrong_flags_raise(words, message):
    with pytest.raises(ArgumentError, match=message):
        parse(words.split())


@pytest.mark.parametrize("text", ["- 1", "r", ""])
def test_a_file_that_holds_no_flags(tmp_path, text):
    (path := tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ArgumentError, match=r"run\.yaml holds no flags"):
        parse(["--config", str(path)])


def test_rank_pattern():
    adapter, *_ = parse_flags(["--rank_pattern", "v_proj=16", "mlp=32"])
    assert adapter.settings()["rank_pattern"] == {"v_proj": 16, "mlp": 32}
    with pytest.raises(ValueError, match="invalid literal for int"):
        parse_flags(["--rank_pattern", "v_proj"])[0].settings()


@pytest.mark.parametrize(("word", "shows_all"), [("--help", False), ("--help_all", True)])
def test_help(capsys, word, shows_all):
    with pytest.raises(SystemExit) as end:
        parse_flags([word])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    of_trl = [f"--{name}" for name in SHOWN]
    for flag in ("--base", "--r", *of_trl):
        assert f"  {flag}" in shown
    assert ("--neftune_noise_alpha" in shown) == shows_all
    assert "--learning-rate" not in shown


def test_all_values_of_a_flag_count():
    assert parse_flags(["--data", "a", "b", "--data", "c"])[1].data == ["a", "b", "c"]


def test_groups_that_are_no_number():
    adapter, _, _ = parse_flags(["--groups", "two"])
    with pytest.raises(TypeError, match="groups must be"):
        disha.plan_adapters(nn.Sequential(nn.Linear(8, 8)), **adapter.settings())
