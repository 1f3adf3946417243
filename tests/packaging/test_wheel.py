"""The sdist and the wheel hold what they should, and the wheel works with nothing else around."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import tarfile
import zipfile
from email.parser import HeaderParser

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import disha
from tests.packaging.newcomer import environment, run
from tests.test_readme import EXAMPLES

DEPENDENCIES = {"torch", "safetensors", "einops"}

TORCH_ITSELF = "ignore:Failed to initialize NumPy:UserWarning"
"""What torch says when it is imported where NumPy is not."""


def metadata_of(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(archive.read(name).decode())


# --- what is built -------------------------------------------------------------------------------


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    info = f"disha_torch-{disha.__version__}.dist-info/"
    package = [name for name in names if not name.startswith(info)]
    assert "disha/py.typed" in package
    assert f"{info}licenses/LICENSE" in names
    for name in package:
        assert name == "disha/py.typed" or re.fullmatch(r"disha/.*\.py", name), name


def test_the_wheel_holds_every_module(wheel):
    from tests.packaging.conftest import ROOT

    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "disha").rglob("*.py")}
    assert modules <= names


def test_the_metadata_is_complete(wheel):
    fields = metadata_of(wheel)
    assert fields["Name"] == "disha-torch"
    assert fields["Version"] == disha.__version__
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["License-File"] == "LICENSE"
    assert fields["Requires-Python"] == ">=3.10"
    assert fields["Description-Content-Type"] == "text/markdown"
    assert len(fields["Summary"]) < 100
    assert "Bone" in fields["Keywords"].split(",")
    assert "Typing :: Typed" in fields.get_all("Classifier")
    assert fields.get_payload().startswith("# disha")


def test_the_sdist_holds_what_builds_tests_and_explains(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {
        "mkdocs.yml",
        *("setup.py", "pyproject.toml", "Makefile", "LICENSE", "README.md", "CHANGELOG.md"),
        *("CONTRIBUTING.md", "CITATION.cff", "conftest.py", "disha/py.typed", "docs/format.md"),
        *("tests/conftest.py", "tests/golden/peft_bone/expected.json", "benchmarks/__main__.py"),
        *("docs/examples/newcomer/train.py", ".pre-commit-config.yaml", ".github/workflows/ci.yml"),
    }
    assert expected <= names
    assert not {name for name in names if "__pycache__" in name or name.endswith(".pyc")}


# --- what is installed ---------------------------------------------------------------------------


def test_what_is_installed_is_what_the_dependencies_need(installed):
    listed = json.loads(run(str(installed.python), "-m", "pip", "list", "--format", "json"))
    names = {canonicalize_name(entry["name"]) for entry in listed}
    assert names - {"pip", "setuptools"} == closure(installed, "disha-torch") - {"setuptools"}
    assert "numpy" not in names


def closure(installed, name):
    """Return the packages that one needs, itself among them, by what is installed."""
    (packages,) = installed.python.parent.parent.glob("lib/python*/site-packages")
    found = {
        canonicalize_name(distribution.metadata["Name"]): distribution
        for distribution in importlib.metadata.distributions(path=[str(packages)])
    }
    needed, left = set(), {canonicalize_name(name)}
    while left:
        one = left.pop()
        needed.add(one)
        requirements = map(Requirement, found[one].requires or [])
        wanted = {
            canonicalize_name(requirement.name)
            for requirement in requirements
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        }
        left |= wanted - needed
    return needed


def test_requirements_are_consistent(installed):
    assert "No broken requirements" in run(str(installed.python), "-m", "pip", "check")


def test_import_warns_of_nothing_and_brings_in_nothing_else(installed, tmp_path):
    code = """
import json, sys
import torch
before = set(sys.modules)
import disha
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps([disha.__file__, sorted(new - sys.stdlib_module_names)]))
"""
    flags = ("-W", "error", "-W", TORCH_ITSELF)
    place, new = json.loads(run(str(installed.python), *flags, "-c", code, cwd=tmp_path))
    assert place.startswith(str(installed.python.parent.parent))
    assert {name for name in new if not name.startswith("_")} <= DEPENDENCIES | {"disha"}


@pytest.mark.parametrize("example", range(len(EXAMPLES)))
def test_example_of_the_readme(example, installed, tmp_path):
    code, output = EXAMPLES[example]
    seeded = f"import torch\ntorch.manual_seed(0)\n{code}"
    assert run(str(installed.python), "-c", seeded, cwd=tmp_path) == output


def test_the_command_says_what_it_needs(installed, tmp_path):
    command = installed.python.with_name("disha")
    done = subprocess.run(
        [command, "merge", "base", "adapter.safetensors", "merged"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert 'pip install "disha-torch[cli]"' in done.stderr
    assert "Traceback" not in done.stderr
    assert run(str(command), "--version") == f"disha {disha.__version__}\n"
