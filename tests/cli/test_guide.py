"""Every command in docs/finetuning.md runs, in the order that they stand there, on tiny files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import disha
from disha.cli.finetune import settings_from
from disha.cli.flags import parsed
from disha.cli.meanings import SHORT
from disha.finetune.settings import EvaluateSettings, FinetuneSettings, GenerateSettings
from tests.cli.documented import GUIDE, prepared_guide, run_in_shell, shell_commands

TEXT = GUIDE.read_text(encoding="utf-8")
COMMANDS = shell_commands(TEXT)
(UPSTREAMS,) = (command for command in COMMANDS if "--init_weights" in command)
TINY = {
    "finetune": ["--max_steps", "2", "--bone_r", "4", "--max_seq_length", "96"],
    "generate": ["--max_new_tokens", "8"],
    "evaluate": ["--max_seq_length", "96"],
}
"""Flags that make a command fit the tiny files; given last, they count."""


@pytest.fixture(scope="module", autouse=True)
def _files():
    """The commands run one after the other in one folder, as a reader runs them."""
    with prepared_guide(TEXT):
        yield


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_command(number):
    command = COMMANDS[number]
    name = re.search(r"\bdisha (\w+)", command)[1]
    code, said = run_in_shell(command, TINY.get(name, ()))
    assert code == 0, said
    output = re.search(r"--output(?:_dir)? (\S+)", command)
    if output and "--dry_run" not in command:
        written = disha.inspect_adapter(Path(output[1]) / "adapter.safetensors")
        assert written.config.method == ("bat" if "output/bat" in command else "bone")


def test_the_commands_are_there():
    assert sum("disha finetune" in command for command in COMMANDS) >= 10
    assert sum(command.startswith("torchrun") for command in COMMANDS) == 2


def test_flags_that_are_named_exist():
    known = {
        "help",
        "nproc-per-node",
        "to",
        "base",
        "force",
        "lora_rank",
        *SHORT,
    }  # of other commands
    known |= set(FinetuneSettings().to_json())
    known |= {*vars(GenerateSettings()), *vars(EvaluateSettings())}
    named = set(re.findall(r"--([a-z][a-z0-9_-]+)", TEXT))
    assert named <= known


def test_every_flag_of_upstreams_command_is_told_of():
    table = TEXT.split("| flag | meaning |")[1].split("\n\n")[0]
    for flag in re.findall(r"--\w+", UPSTREAMS):
        assert f"`{flag}`" in table, flag


def test_the_readmes_commands_are_understood():
    readme = (GUIDE.parents[1] / "README.md").read_text(encoding="utf-8")
    kinds = {"generate": GenerateSettings, "evaluate": EvaluateSettings}
    found = []
    for command in shell_commands(readme):
        words = shlex.split(command, comments=True)
        if words[:2] == ["disha", "finetune"]:
            assert settings_from(words[2:]).adapter.method_name == "bone"
        elif words[0] == "disha" and words[1] in kinds:
            kind = kinds[words[1]]
            assert parsed(kind, words[1], words[2:], "", kind()).adapter is not None
        found.append(words[1])
    assert {"finetune", "generate", "evaluate"} <= set(found)


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([\w.-]+\.md)", TEXT):
        assert (GUIDE.parent / link).exists(), link


def test_the_advice_on_learning_rates_has_the_numbers_of_their_sources():
    docs = GUIDE.parent
    choosing = (docs / "choosing.md").read_text(encoding="utf-8")
    section = choosing.split("\n## Learning rate\n")[1].split("\n## ")[0]
    examples, measured, default, author = map(
        float,
        re.findall(r"^\| a.* \| (\S+) \|", section.replace("| tiny", "| a tiny"), re.MULTILINE),
    )
    evidence = (docs / "evidence.md").read_text(encoding="utf-8")
    assert measured == float(re.search(r"^\| Bone \| .*? \| (\S+) \|", evidence, re.MULTILINE)[1])
    assert default == FinetuneSettings().training.learning_rate
    assert author == settings_from(shlex.split(UPSTREAMS)[2:]).training.learning_rate
    for page in ("index.md", "../README.md"):
        assert examples == float(re.search(r"lr=(\S+)\)", (docs / page).read_text("utf-8"))[1])
    for page in ("index.md", "../README.md", "finetuning.md", "evidence.md"):
        assert "choosing.md#learning-rate" in (docs / page).read_text("utf-8"), page
