"""A user's script has no errors for pyright, and types can be read at run time."""

import inspect
import subprocess
import sys
import typing
from importlib import import_module

import pytest

import disha
from disha.interop import image_lora, lora
from tests import typed_script
from tests.pages import ROOT

PARTS = (
    *("disha", "disha.functional", "disha.interop.checkpoints", "disha.interop.image_lora"),
    *("disha.interop.lora", "disha.interop.peft", "disha.integrations.trl"),
)


def test_a_users_script_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    typed_script.main()
    first, written, loaded = capsys.readouterr().out.splitlines()
    assert first == "4 [True, True] [4, 4] last"
    assert written == "0.0 as-miss"
    assert loaded == "('first.bone_block',)"


def test_a_users_script_has_no_errors():
    """For mypy neither: `make lint` gives it the script with the whole library."""
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable]
    command.append("tests/typed_script.py")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_a_call_would_not_tell_is_named():
    named = {disha.save_adapter: "metadata", disha.load_adapter_state_dict: "strict"}
    named |= dict.fromkeys((image_lora.export, lora.export, lora.export_tensors), "rank")
    for function, argument in named.items():
        kind = inspect.signature(function).parameters[argument].kind
        assert kind is inspect.Parameter.KEYWORD_ONLY, function


@pytest.mark.parametrize("part", PARTS)
def test_types_of_public_names_can_be_read(part):
    module = import_module(part)
    for name in module.__all__:
        item = getattr(module, name)
        hints = typing.get_type_hints(item) if callable(item) else {}
        if inspect.isfunction(item):
            assert hints.keys() >= inspect.signature(item).parameters.keys(), name
