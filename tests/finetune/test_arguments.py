import pytest
import yaml

from disha import ArgumentError, DishaError
from disha.finetune.arguments import parse_flags

AUTHORS = """--base_model_name_or_path model --output_dir output/bone --bone_r 32 --init_weights bat
--bits bf16 --data_path meta-math/MetaMathQA --dataset_split train[:100000]
--dataset_field query response --bf16 True --num_train_epochs 1 --per_device_train_batch_size 2
--gradient_accumulation_steps 8 --save_strategy steps --save_steps 1000 --save_total_limit 1
--logging_steps 1 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --tf32 True
--report_to none"""


def test_the_authors_command_line(capsys):
    adapter, data, training = parse_flags(AUTHORS.split())
    assert (adapter.base, adapter.r, adapter.method, adapter.bits) == ("model", 32, "bat", "bf16")
    assert data.data == ["meta-math/MetaMathQA"]
    assert data.dataset_field == ["query", "response"]
    assert training.warmup_steps == 0.03
    assert training.save_steps == 1000
    assert training.bf16
    if training.use_cpu:
        assert training.tf32 is None
        assert "note: --tf32 does nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--lr 0.5", "learning_rate", 0.5),
        ("--epochs=2", "num_train_epochs", 2.0),
        ("--batch-size 3", "per_device_train_batch_size", 3),
        ("--max_seq_length 7", "max_length", 7),
        ("--per-device-train-batch-size 3", "per_device_train_batch_size", 3),
        ("--gradient_checkpointing", "gradient_checkpointing", True),
    ],
)
def test_other_names_of_flags(words, name, value):
    assert getattr(parse_flags(words.split())[2], name) == value


@pytest.mark.parametrize(
    ("groups", "method"), [("1", "miss"), ("3", "bone_groups3"), ("all", "bone_groups_all")]
)
def test_groups_of_shards(groups, method):
    adapter, _, _ = parse_flags(["--groups", groups, "--method", "miss"])
    assert adapter.settings()["method"] == method


def test_a_file_of_flags_and_the_command_line_wins(tmp_path):
    path = tmp_path / "run.yaml"
    flags = {"bone_r": 16, "data": ["a.json", "b.json"], "lr": 0.5, "bf16": False, "base": None}
    path.write_text(yaml.safe_dump(flags | {"exclude": [], "dataset_text_field": "body"}))
    adapter, data, training = parse_flags(["--learning_rate", "0.1", "--config", str(path)])
    assert (adapter.r, data.data, training.learning_rate) == (16, ["a.json", "b.json"], 0.1)
    assert (adapter.base, adapter.exclude, data.dataset_field) == (None, [], ["body"])
    assert parse_flags([f"--config={path}"])[0].r == 16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--learning_rat 1", "no flag --learning_rat; did you mean --learning_rate?"),
        ("--zzzz", "no flag --zzzz; --help_all shows"),
        ("--bits 3", "invalid choice: '3'"),
        ("--r many", "invalid int value: 'many'"),
        ("--groups few", "--groups must be a number from 1, or all; got few"),
        ("--groups 2 --method bat", "leave --groups out: only bone takes groups of shards"),
        ("--init_weights True --method lora", "True means Bone, and the adapter has method=lora"),
        ("--config", "--config needs a YAML file"),
        ("--eval_fraction 1.5", "--eval_fraction must be below 1, got 1.5"),
        ("--config nowhere.yaml", "can't be read as YAML"),
    ],
)
def test_wrong_flags_raise(words, message):
    with pytest.raises(ArgumentError, match=message.replace("?", r"\?")):
        parse_flags(words.split())


@pytest.mark.parametrize("text", ["a: [", "- 1", "r"])
def test_a_file_that_holds_no_flags(tmp_path, text):
    (path := tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ArgumentError, match=r"run\.yaml"):
        parse_flags(["--config", str(path)])


def test_rank_pattern():
    adapter, *_ = parse_flags(["--rank_pattern", "v_proj=16", "mlp=32"])
    assert adapter.settings()["rank_pattern"] == {"v_proj": 16, "mlp": 32}
    with pytest.raises(ArgumentError, match="needs regex=r"):
        parse_flags(["--rank_pattern", "v_proj"])[0].settings()


@pytest.mark.parametrize(("word", "shows_all"), [("--help", False), ("--help_all", True)])
def test_help(capsys, word, shows_all):
    with pytest.raises(SystemExit) as end:
        parse_flags([word])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for flag in ("--base, --base_model_name_or_path", "--r, --bone_r", "--learning_rate"):
        assert f"  {flag}" in shown
    assert ("--neftune_noise_alpha" in shown) == shows_all
    assert "--learning-rate" not in shown


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--load_in_4bit True", "no flag --load_in_4bit; use --bits 4"),
        ("--lora-r=8", "use --r"),
        ("--target q_proj,v_proj", "separate names by spaces: q_proj v_proj"),
        ("--trust_remote_code True", "code in the folder of a model never"),
        ('--model_init_kwargs {"a":1}', "--model_init_kwargs can't be used: .*--attn_impl"),
        ("--lr_scheduler_type nope", "nope is not a valid SchedulerType"),
        ("--report_to wandb", "--report_to: .*wandb"),
        ("--report_to nobody", "nobody is not supported"),
        ("--fsdp full_shard", "--fsdp shards the base among several processes; start them"),
        ("--load_best_model_at_end", "save and eval strategy to match"),
        ("--resume_from_checkpoint no/such", "no/such is not a complete checkpoint of a run"),
        ("--per_device_eval_batch_size 0", "--per_device_eval_batch_size must be at least 1"),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps must be at least 1"),
        ("--learning_rate -1", "--learning_rate must not be negative, got -1"),
        ("--new_tokens=", "--new_tokens must not hold an empty text"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(words, says):
    with pytest.raises(DishaError, match=says):
        parse_flags(words.split())


def test_values_that_do_not_count_are_told():
    with pytest.warns(UserWarning, match="--data comes 2 times, and the last one alone counts"):
        assert parse_flags(["--data", "a", "b", "--data", "c"])[1].data == ["c"]


def test_new_tokens_count_once():
    assert parse_flags(["--new_tokens", "<a>", "<b>", "<a>"])[0].new_tokens == ["<a>", "<b>"]


def test_the_last_checkpoint_is_named_as_in_trainer():
    training = parse_flags(["--resume_from_checkpoint", "True"])[2]
    assert training.resume
    assert training.resume_from_checkpoint is None


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (None, "can't be read"),
        (b"r: 8\nbase: \xe9\n", "line 2 of .* not in UTF-8: it has the byte 0xe9"),
    ],
)
def test_a_file_of_flags_that_can_not_be_read(tmp_path, content, says):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArgumentError, match=says):
        parse_flags(["--config", str(path)])
