"""The sdist and the wheel hold what they should."""

import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import disha
from tests.pages import ROOT


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """The folder with the sdist, and the wheel that is built from it."""
    place = tmp_path_factory.mktemp("dist")
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", str(place), str(ROOT))
    subprocess.run(command, check=True, capture_output=True, cwd=place)
    return place


def test_the_wheel_holds_the_package_and_nothing_else(dist):
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = f"disha_torch-{disha.__version__}.dist-info/"
        fields = HeaderParser().parsestr(archive.read(f"{info}METADATA").decode())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "disha").rglob("*.py")}
    data = {"disha/py.typed", "disha/finetune/names.toml"}
    assert {name for name in names if not name.startswith(info)} == data | modules
    assert f"{info}licenses/LICENSE" in names
    assert (fields["Name"], fields["Version"]) == ("disha-torch", disha.__version__)
    assert (fields["License-Expression"], fields["Requires-Python"]) == ("Apache-2.0", ">=3.11")
    assert "Typing :: Typed" in fields.get_all("Classifier")
    assert fields.get_payload().startswith("# disha")


def test_the_sdist_holds_what_builds_tests_and_explains(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {
        *("setup.py", "pyproject.toml", "mkdocs.yml", "Makefile", "LICENSE", "conftest.py"),
        *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "SECURITY.md"),
        *("disha/py.typed", "docs/reference/format.md", "docs/examples/newcomer/train.py"),
        *("tests/conftest.py", "benchmarks/__main__.py", ".github/workflows/ci.yml"),
    }
    assert expected <= names
    assert not [name for name in names if re.search(r"__pycache__|\.pyc$", name)]
