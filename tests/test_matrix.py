"""The legs of `tests.matrix` are the ends of what setup.py supports; its tests are core."""

import re
from pathlib import Path

import pytest

from tests import matrix
from tests.core import ROOT, foreign_imports, is_core

SETUP = (ROOT / "setup.py").read_text()


def test_the_oldest_leg_is_at_the_lower_bounds():
    bounds = dict(re.findall(r'"(torch|safetensors|einops)>=([\d.]+)"', SETUP))
    oldest = matrix.LEGS[0]
    assert oldest.python in re.search(r'python_requires=">=([\d.]+)"', SETUP).group(1)
    pattern = re.compile(r"(\w+)>=([\d.]+),<[\d.]+")  # a range: a pin keeps fixes out
    found = dict(pattern.fullmatch(wanted).groups() for wanted in oldest.dependencies)
    assert found == bounds


def test_the_newest_leg_is_the_newest_python_that_is_declared():
    declared = re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', SETUP)
    assert matrix.LEGS[1].python == f"3.{max(map(int, declared))}"


def test_a_python_that_is_not_there_is_left_out(tmp_path):
    assert matrix.interpreter("3.1") is None
    leg = matrix.Leg("none", "3.1", ("torch",))
    assert matrix.run(leg, tmp_path, []) == (
        "left out: no Python 3.1 here; install it as python3.1"
    )
    assert not list(tmp_path.iterdir())


def test_a_python_that_does_not_run_is_passed_over(tmp_path, monkeypatch):
    shim = tmp_path / "python3.77"
    shim.write_text("#!/bin/sh\necho 'not chosen' >&2\nexit 127\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert matrix.interpreter("3.77") is None
    other = tmp_path / "versions" / "3.77.1" / "bin" / "python"
    other.parent.mkdir(parents=True)
    other.write_text("#!/bin/sh\necho 3.77\n")
    other.chmod(0o755)
    assert matrix.interpreter("3.77") == str(other)


def test_all_legs_left_out_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["matrix"])
    monkeypatch.setattr(matrix, "interpreter", lambda version: None)
    assert matrix.main() == 1
    assert capsys.readouterr().out.count("left out") == 2


@pytest.mark.parametrize(
    ("path", "core"),
    [
        ("tests", True),
        ("tests/test_layers.py", True),
        ("tests/test_format.py", True),
        ("disha/files", True),
        ("disha/files/adapter.py", True),
        ("disha/finetune", False),
        ("disha/cli/merge.py", False),
        ("disha/integrations/trl.py", False),
        ("tests/cli", False),
        ("tests/packaging", False),
        ("tests/test_kinds.py", False),  # transformers
        ("tests/test_benchmarks.py", False),  # benchmarks
    ],
)
def test_what_is_core(path, core):
    assert is_core(Path(path)) == core


def test_imports_are_followed_through_other_files_of_tests():
    assert foreign_imports(Path("tests/test_format.py")) == frozenset()
    assert "peft" in foreign_imports(Path("tests/test_peft_oracle.py"))
    assert {"transformers", "timm"} <= foreign_imports(Path("tests/test_whole_models.py"))
