"""The commands of docs/finetuning.md and of the tutorial run as they stand there, in order."""

import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import disha
from disha.cli import main
from tests.finetune.tiny_models import rows, write_model, write_rows

PAGE = Path(__file__).parents[2] / "docs/finetuning.md"


def commands(page=PAGE):
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line)


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, "model")
    write_rows(Path("train.jsonl"))
    write_rows(Path("held_out.jsonl"), rows(8))
    written = re.search(r"^```yaml\n# run.yaml\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.M)
    Path("run.yaml").write_text(written[1])
    return tmp_path


@pytest.mark.usefixtures("_empty_plots")
@pytest.mark.filterwarnings("ignore:--tf32 does nothing")
def test_commands(folder, capsys):
    ran = [words for words in commands() if words[0] == "disha"]
    assert {words[1] for words in ran} == {"finetune", "generate", "evaluate", "merge"}
    for words in ran:
        if words[-1] == "--resume":
            shutil.rmtree("output/long/checkpoint-12")  # as if it had been killed before
        assert main(words[1:]) == 0, (words, capsys.readouterr().err)
    assert Path("merged-first/model.safetensors").exists()


def test_the_other_commands_are_no_others():
    assert {words[0] for words in commands()} == {"accelerate", "disha", "pip", "torchrun"}


MIGRATING = PAGE.with_name("migrating.md")


def test_the_commands_and_files_of_others_run(folder, capsys):
    section = MIGRATING.read_text().split("\n## Commands and files of others\n")[1]
    section = section.split("\n## ")[0]
    for name, text in re.findall(r"^```yaml\n# (\S+)\n(.*?)^```", section, re.DOTALL | re.M):
        Path(name).write_text(text)
    lines = re.findall(r"^disha (finetune .*)$", section, re.MULTILINE)
    assert len(lines) == 5
    for line in lines:
        assert main([*shlex.split(line), "--dry_run"]) == 0, (line, capsys.readouterr().err)


# --- the tutorial: its base is an 8B model, and a tiny one stands in for it -----------------------

TUTORIAL = PAGE.parent / "guides" / "tutorial.md"
SERVING = PAGE.parent / "guides" / "vllm.md"
BASE = "meta-llama/Llama-3.1-8B-Instruct"
FEW_STEPS = ["--max_steps", "4"]
"""Enough to see that a command runs: its own three epochs take minutes on a processor."""


@pytest.fixture
def shop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(Path("model"), chat=True)
    script = re.search(r"^```python\n# make_data.py\n(.*?)^```", TUTORIAL.read_text(), re.S | re.M)
    Path("make_data.py").write_text(script[1], encoding="utf-8")
    return tmp_path


@pytest.mark.usefixtures("_empty_plots")
def test_every_command_of_the_tutorial_runs(shop, capsys):
    seen = []
    for words in commands(TUTORIAL):
        words = ["model" if word == BASE else word for word in words]
        seen.append(words[1] if words[0] == "disha" else words[0])
        if words[0] == "python":
            runpy.run_path(words[1])
        elif words[0] == "disha":
            few = FEW_STEPS if words[1] == "finetune" else []
            assert main([*words[1:], *few]) == 0, (words, capsys.readouterr().err)
        else:
            assert words[:6] == ["torchrun", "--nproc_per_node", "8", "-m", "disha", "finetune"]
            assert main(["finetune", *words[6:], *FEW_STEPS]) == 0  # the same flags, in one process
    assert seen == [
        *("python", "finetune", "finetune", "torchrun", "evaluate", "generate", "inspect"),
        *("convert", "merge"),
    ]
    assert Path("merged-support/model.safetensors").exists()
    rank = json.loads(Path("for-vllm/adapter_config.json").read_text())["r"]
    served = int(re.search(r"--max-lora-rank (\d+)", SERVING.read_text())[1])
    assert served == rank


def test_the_page_of_vllm_serves_with_the_flags_that_convert_prints(shop, capsys):
    model = disha.inject_adapters(torch.nn.Sequential(torch.nn.Linear(64, 64)), "0", r=64)
    disha.save_adapter(model, "a")
    capsys.readouterr()
    assert main(["convert", "a", "for-vllm", "--to", "lora"]) == 0
    printed = shlex.split(capsys.readouterr().out.partition("to serve it: ")[2])
    ours = shlex.split(re.search(r"vllm serve .*?for-vllm$", SERVING.read_text(), re.S | re.M)[0])
    assert [word for word in printed[3:] if "=" not in word and word not in ours] == []
    assert "--max-model-len" in ours
