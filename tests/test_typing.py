"""What a type checker sees of the library: every public name, and no others."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import disha
from disha import functional

ROOT = Path(__file__).parent.parent
TYPED = Path(__file__).with_name("typed_api.py")

WRONG = {
    "disha.inject_adapterz": "[attr-defined]",
    'disha.inject_adapters(model, "all-linear", "8")': "[arg-type]",
    'disha.inject_adapters(model, "all-linear", r=8, methods="bat")': "[call-arg]",
    "disha.BoneLinear(8, 16)": "[call-arg]",
    "disha.interop.lora.exports": "[attr-defined]",
    "disha.summary(model).trained": "[attr-defined]",
}
"""What a checker has to refuse, and the code of its error."""


@pytest.mark.parametrize(
    ("room", "names"),
    [
        ("disha", disha.__all__),
        ("functional", functional.__all__),
        ("checkpoints", disha.interop.checkpoints.__all__),
        ("lora", disha.interop.lora.__all__),
        ("peft", disha.interop.peft.__all__),
    ],
)
def test_the_typed_file_uses_every_public_name(room, names):
    tree = ast.parse(TYPED.read_text())
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    missing = sorted(set(names) - used)
    assert not missing, f"{TYPED.name} does not use {', '.join(missing)} of {room}"


def test_mypy_accepts_the_typed_file_and_refuses_what_is_wrong(tmp_path):
    """One run for both: most of it is spent on reading torch."""
    wrong = tmp_path / "wrong.py"
    head = "import disha\nfrom torch import nn\nmodel = nn.Linear(8, 16)\n"
    wrong.write_text(head + "\n".join(WRONG) + "\ndisha.merge_adapters(model)\n")
    output = _mypy(TYPED, wrong)
    found = dict(re.findall(r"wrong\.py:(\d+): error: .*(\[[\w-]+\])$", output, re.MULTILINE))
    expected = {str(line): code for line, code in enumerate(WRONG.values(), start=4)}
    assert found == expected, output
    assert TYPED.name not in output, output


def _mypy(*files: Path) -> str:
    """Return what mypy says of files, with the settings of this project."""
    command = (sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"))
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *map(str, files)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout
