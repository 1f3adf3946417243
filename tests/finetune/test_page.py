"""The commands on docs/finetuning.md run as they stand there, in their order."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from disha.cli import main
from tests.finetune.tiny_models import rows, write_rows

PAGE = Path(__file__).parents[2] / "docs/finetuning.md"


def commands():
    for block in re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE):
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
