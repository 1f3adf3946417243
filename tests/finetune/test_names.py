"""The names that flags have elsewhere, what they become here, and how fast a wrong one is told."""

import dataclasses
import re
import shlex
import subprocess
import sys
import time

import peft
import pytest
import trl
from torch import nn

import disha
from disha import ArgumentError
from disha.cli import main as disha_command
from disha.finetune import main
from disha.finetune.arguments import AdapterArguments, DataArguments, TrainingArguments, parse_flags
from disha.finetune.names import FAMILIES, SYMBOLS, flags_of_sources, translate
from tests.finetune.command_lines import AUTHOR, COMMAND_LINES, FILES, PEFT, TRL, fill
from tests.processes import environment


def here(line):
    """Return the words of a command line in ours, sorted."""
    return sorted(translate(line.split())[0])


@pytest.mark.filterwarnings("ignore:--tf32 does nothing")
class TestPeers:
    """Command lines and files of others run as they are, but for paths."""

    @pytest.mark.parametrize("name", COMMAND_LINES)
    def test_a_command_line_passes_a_dry_run(self, name, chatty, data, tmp_path, capsys):
        words = fill(COMMAND_LINES[name], chatty, data, tmp_path / "out").split()
        assert disha_command(["finetune", *words, "--dry_run"]) == 0, capsys.readouterr().err
        assert "it fits: cpu has" in capsys.readouterr().out
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("name", FILES)
    def test_a_file_passes_a_dry_run(self, name, chatty, data, tmp_path, capsys):
        path = tmp_path / "theirs.yaml"
        path.write_text(fill(FILES[name], chatty, data, tmp_path / "out"))
        assert disha_command(["finetune", "--config", str(path), "--dry_run"]) == 0
        assert "it fits: cpu has" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("line", "method", "r", "scale"),
        [
            (TRL["lora"], "lora", 32, 0.5),
            (PEFT["bat"], "bat", 64, 1.0),
            (AUTHOR["miss"], "bone", 64, 1.0),
        ],
    )
    def test_one_of_each_family_trains(self, line, method, r, scale, chatty, data, tmp_path):
        words = fill(line, chatty, data, tmp_path).replace("--push_to_hub", "").split()
        words += ["--report_to", "none", "--samples", "0", "--max_steps", "2"]
        assert main(words) == 0
        file = disha.inspect_adapter(tmp_path)
        assert (file.config.method, file.config.r, file.config.scale) == (method, r, scale)
        assert len(file.layers) == 14


@pytest.mark.parametrize(
    ("line", "ours"),
    [
        ("--use_peft --lora_r 32 --lora_alpha 16",
         "--method=lora --r=32 --scale=0.5 --dropout=0.05"),
        ("--use_peft", "--method=lora --r=16 --scale=2 --dropout=0.05"),
        ("--use_peft --r 4", "--method=lora --r=4 --scale=8 --dropout=0.05"),
        ("--use_lora True --lora_alpha 4", "--method=lora --r=8 --scale=0.5"),
        ("--lora_r 16 --lora_alpha 8 --use_rslora", "--method=lora --r=16 --scale=2"),
        ("--use_peft False --use_dora False", ""),
        ("--use_miss True --miss_r 8 --init_miss_weights bat", "--method=bat --r=8"),
        ("--miss_r 8 --miss_mini_r 4 --init_miss_weights mini", "--r=8 --r_out=4 --method=bone"),
        ("--use_miss True --miss_mini_r 4", ""),
        ("--bone_r 8 --method bat", "--r=8 --method=bat"),
        ("--init_weights mini", "--method=bone --r_out=1"),
        ("--method miss", "--method=bone"),
        ("--lora_modules_to_save embed_tokens norm",
         r"--also_train '(^|\.)embed_tokens\.' '(^|\.)norm\.'"),
        ("--load_in_4bit --dtype bfloat16", "--bits=4"),
        ("--dtype bfloat16", "--bits=bf16"),
        ("--bits 16 --double_quant --quant_type nf4", "--bits=bf16"),
        ("--model_name_or_path a --model_revision v1", "--base=a --revision=v1"),
        ("--model_revision main", ""),
        ("--dataset_name a --dataset_config b --dataset_train_split c --dataset_test_split d",
         "--data=a --dataset_config=b --dataset_split=c --eval_split=d"),
        ("--merge_and_save True", "--merge"),
        ("--run_name ALPHA --group_by_length False",
         "--run_name=ALPHA --train_sampling_strategy=random"),
        ("--model_max_length 7", "--max_length=7"),
        ("--target_regex q_proj --target_modules v_proj",
         r"--target=q_proj '--target=(^|\.)v_proj$'"),
        ("--target_modules all-linear", "--target=all-linear"),
        ("--adapter-dropout 0.1 --lr=0.5 --resume",
         "--dropout=0.1 --learning_rate=0.5 --resume_from_checkpoint"),
        ("--evals_per_epoch 4 --num_epochs 2",
         "--eval_strategy=steps --eval_steps=0.125 --num_train_epochs=2"),
    ],
)  # fmt: skip
def test_a_name_elsewhere_is_ours(line, ours):
    assert here(line) == sorted(shlex.split(ours))


@pytest.mark.parametrize(
    ("target", "names"),
    [
        (["q_proj"], ["q_proj", "sub.q_proj", "my_q_proj", "q_proj_2", "sub.q_proj.more"]),
        (["sub.q_proj", "v"], ["q_proj", "sub.q_proj", "v", "a.v"]),
        (r".*\.(q|v)_proj", ["a.q_proj", "a.v_proj", "q_proj", "a.v_proj.b"]),
    ],
)
def test_names_match_what_peft_matches(target, names):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            for name in names:
                module = self
                *path, last = name.split(".")
                for part in path:
                    if not hasattr(module, part):
                        module.add_module(part, nn.Module())
                    module = getattr(module, part)
                if not hasattr(module, last):
                    module.add_module(last, nn.Linear(4, 4))

        def forward(self, x):
            return x

    theirs = peft.get_peft_model(Named(), peft.LoraConfig(r=2, target_modules=target))
    expected = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
        for name, module in theirs.named_modules()
        if name.endswith("lora_A.default")
    }
    given = [target] if isinstance(target, str) else [",".join(target)]
    words, _ = translate(["--target_modules", *given])
    adapter, *_ = parse_flags(words)
    plan = disha.plan_adapters(Named(), adapter.target, 2)
    assert {layer.name for layer in plan.layers} == expected


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--use_miss True --lora_r 8",
         "--use_miss True (--method miss) contradicts --lora_r 8 (--method lora)"),
        ("--r 8 --lora_r 16", "--r 8 contradicts --lora_r 16 (--r 16)"),
        ("--scale 3 --lora_alpha 16 --lora_r 8", "--scale 3 contradicts --lora_alpha 16"),
        ("--load_in_4bit --load_in_8bit", "--load_in_4bit (--bits 4) contradicts --load_in_8bit"),
        ("--use_dora True", "--use_dora True: DoRA also learns the length of"),
        ("--init_lora_weights pissa_niter_4", "PiSSA, OLoRA and others begin with factors"),
        ("--init_lora_weights olora", "write --init_lora_weights True"),
        ("--init_weights False", "the block begins at zero"),
        ("--quant_type fp4", "4 bits are nf4 here"),
        ("run.yaml", "'run.yaml' is no flag"),
    ],
)  # fmt: skip
def test_what_can_not_be_has_a_sentence(line, says):
    with pytest.raises(ArgumentError, match=re.escape(says)):
        translate(line.split())


def test_the_command_line_wins_over_a_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("adapter: lora\nlora_r: 16\nlora_alpha: 32\nnum_epochs: 3\n")
    line = f"--config {path} --r 8 --epochs 1"
    assert here(line) == sorted(["--r=8", "--num_train_epochs=1", "--method=lora", "--scale=4"])
    path.write_text(
        "datasets:\n- path: a\n  type: alpaca\n- path: b\nspecial_tokens:\n  eos_token: e\n"
    )
    assert here(f"--config {path}") == ["--data", "--eos_token=e", "a", "b"]
    path.write_text("datasets: [{path: a, split: dev}]\n")
    with pytest.raises(ArgumentError, match="of datasets, path and type are read"):
        here(f"--config {path}")
    path.write_text("method: bat\n")
    assert here(f"--config {path} --bone_r 8") == ["--method=bat", "--r=8"]


def test_what_was_translated_is_told_once(capsys):
    with pytest.raises(ArgumentError, match="which model"):
        main(["--use_peft", "--lora_r", "8", "--trust_remote_code", "True", "--lr", "0.1"])
    first, second, third = capsys.readouterr().out.splitlines()
    read = "read as --method lora --r 8 --scale 4 --dropout 0.05"
    assert first == f"--use_peft --lora_r 8: {read}"
    assert second.startswith("--trust_remote_code True needs nothing here: Python code")
    assert third.startswith("on cpu: --bits fp32")


# --- unknown names -------------------------------------------------------------------------------


def test_all_unknown_flags_are_told_at_once_and_before_a_trainer_is_imported():
    words = ["--zzz", "1", "--lerning_rate", "3", "--use_mis", "True", "--learning_rate", "1"]
    code = (
        "import sys; from disha.cli import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 'trl', 'transformers'} & set(sys.modules); sys.exit(code)"
    )
    began = time.monotonic()
    command = [sys.executable, "-c", code, "finetune", *words]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "disha: disha finetune does not take --zzz, --lerning_rate (did you mean "
        "--learning_rate?), --use_mis (did you mean --use_miss?)\n"
    )
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("name", ["lora_rnk", "use_pef"])
def test_a_slip_in_a_name_elsewhere(name):
    with pytest.raises(ArgumentError, match=rf"--{name} \(did you mean --"):
        translate([f"--{name}", "1"])


@pytest.mark.parametrize("name", ["use_me", "lora_module", "peft_type", "rho"])
def test_no_advice_is_better_than_a_wrong_one(name):
    with pytest.raises(ArgumentError, match=rf"does not take --{name}$"):
        translate([f"--{name}", "1"])


@pytest.mark.parametrize("fields", [AdapterArguments, DataArguments, TrainingArguments])
def test_the_sources_have_all_fields(fields):
    assert {field.name for field in dataclasses.fields(fields)} <= flags_of_sources()


@pytest.mark.parametrize("fields", [trl.ModelConfig, trl.ScriptArguments])
def test_every_flag_of_trl_sft_is_taken_or_has_a_sentence(fields):
    known = flags_of_sources() | {name.partition("=")[0] for name in FAMILIES["trl"]}
    assert {field.name for field in dataclasses.fields(fields)} <= known


def test_the_table_is_of_flags_that_there_are():
    """Each meaning is flags of ours, with known symbols; what several projects have is the same."""
    flags = {
        field.name
        for fields in (AdapterArguments, DataArguments, TrainingArguments)
        for field in dataclasses.fields(fields)
        if field.init
    }
    meanings = {}
    for family in FAMILIES.values():
        for name, meaning in family.items():
            assert meanings.setdefault(name, meaning) == meaning, name
            if meaning.startswith("--"):
                assert set(re.findall(r"--(\w+)", meaning)) <= flags, name
                assert set(re.findall(r"\b[A-Z]{3,}\b", meaning)) <= SYMBOLS.keys(), name
