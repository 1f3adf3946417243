"""Names and notes of files, and paths, can't reach a terminal as they are, whoever prints them."""

import contextlib
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import disha
from disha.cli import main
from disha.files.differences import header_differences
from disha.interop.checkpoints import merge_into_checkpoint, verify_against

BAD = "\x1b]0;x\x07\r\x1b[2J\u202e\u200b"
REGEX = re.escape(BAD)
PLAIN = re.compile(r"[^\x1b\x07\r\u202e\u200b]*")


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.add_module(f"a{BAD}", nn.Linear(8, 4))
        self.add_module(f"b{BAD}", nn.LayerNorm(4))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder with two adapters and two bases; one base is another model's."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = Named()
    save_file(model.state_dict(), f"base{BAD}")
    save_file({f"c{BAD}": torch.zeros(2)}, f"other{BAD}")
    for name, r in (("one", 2), ("two", 4)):
        disha.inject_adapters(model, f"^a|{REGEX}{name}", r, adapter=name)
        disha.save_adapter(model, f"{name}{BAD}", name, metadata={BAD: name, f"{name}{BAD}": BAD})
    return tmp_path


ONE, TWO, BASE, OTHER = (f"{name}{BAD}" for name in ("one", "two", "base", "other"))
COMMANDS = [
    ["inspect", ONE],
    ["inspect", ONE, "--stats"],
    ["diff", ONE, TWO],
    ["diff", ONE, ONE],
    ["verify", ONE],
    ["verify", ONE, "--base", BASE],
    ["verify", ONE, "--base", OTHER],
    ["convert", ONE, f"peft{BAD}", "--to", "peft"],
    ["convert", ONE, f"lora{BAD}", "--to", "lora"],
    ["convert", ONE, f"gguf{BAD}", "--to", "gguf", "--base", BASE],
    ["combine", "--adapter", f"{ONE}=1", "--adapter", f"{TWO}=1", f"both{BAD}"],
    ["merge", BASE, ONE, f"merged{BAD}"],
    ["merge", OTHER, ONE, f"merged{BAD}"],
    ["inspect", f"absent{BAD}"],
    [f"unknown{BAD}"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: "-".join(words).replace(BAD, ""))
@pytest.mark.parametrize("as_json", [False, True])
def test_of_commands(folder, capsys, words, as_json):
    with contextlib.suppress(SystemExit):
        main([*words, *["--json"] * as_json])
    said = capsys.readouterr()
    assert len(said.out + said.err) > 10
    assert PLAIN.fullmatch(said.out)
    assert PLAIN.fullmatch(said.err)


def test_of_reports(folder):
    one, two = disha.inspect_adapter(ONE), disha.inspect_adapter(TWO)
    model = Named()
    report = disha.load_adapter(model, ONE)
    for printed in (
        one,
        report,
        disha.summary(model),
        disha.plan_adapters(Named(), "a", 4),
        verify_against(OTHER, ONE),
        verify_against(BASE, TWO),
        merge_into_checkpoint(BASE, ONE, "merged"),
        *header_differences(one, two),
    ):
        assert PLAIN.fullmatch(str(printed)), type(printed)
