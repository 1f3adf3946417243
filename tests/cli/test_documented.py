"""docs/cli.md tells what the commands print, their JSON keys and their exit codes."""

from __future__ import annotations

import re

import pytest

from disha.cli import COMMANDS, dispatcher
from tests.cli.documented import PAGE, consoles, prepared, printed, steady

TEXT = PAGE.read_text(encoding="utf-8")
CONSOLES = consoles(TEXT)


@pytest.fixture(scope="module", autouse=True)
def _files():
    """The examples run one after the other in one folder, as a reader runs them."""
    with prepared(TEXT):
        yield


@pytest.mark.parametrize("number", range(len(CONSOLES)))
def test_example(number):
    assert steady(printed(CONSOLES[number])) == steady(CONSOLES[number])


def keys(value):
    if isinstance(value, dict):
        return set(value) | {
            key for name, one in value.items() if name not in FREE for key in keys(one)
        }
    return {key for one in value for key in keys(one)} if isinstance(value, list) else set()


FREE = ("config", "metadata")
"""Objects whose keys are described elsewhere, or the user's."""


@pytest.mark.parametrize(
    "command",
    [
        "inspect chat.safetensors --stats",
        "diff chat.safetensors code.safetensors",
        "verify chat.safetensors --base base",
        "convert chat.safetensors again-lora --to lora",
        "combine --adapter chat.safetensors=1 again.safetensors",
        "merge base chat.safetensors merged-again",
        "generate --base_model_name_or_path model --adapter output/adapter.safetensors "
        "--prompt a --compare",
        "evaluate --base_model_name_or_path model --data_path held_out.jsonl --max_seq_length 96",
    ],
)
def test_every_json_key_is_told_of(command, run):
    name, *rest = command.split()
    section = TEXT.split(f"\n## {name}\n")[1].split("\n## ")[0]
    found = keys(run(name, *rest, "--json").json)
    assert len(found) >= 4
    assert found <= set(re.findall(r"`(\w+)`", section))


def test_every_command_has_examples():
    for name in COMMANDS:
        assert f"\n## {name}\n" in TEXT
        assert any(f"$ disha {name} " in console for console in CONSOLES), name


def test_exit_codes_are_those_of_the_code():
    rows = [line for line in dispatcher.__doc__.splitlines() if line.startswith("|")]
    assert len(rows) == 6
    assert "\n".join(rows) in TEXT
