"""What is built, and one environment in which it is installed, for all tests of this folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import once
from tests.packaging import newcomer

ROOT = Path(__file__).parent.parent.parent
SOURCES = (
    "mkdocs.yml",
    *(
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "CITATION.cff",
        "SECURITY.md",
        "LICENSE",
        "MANIFEST.in",
    ),
    *("Makefile", "setup.py", "pyproject.toml", "conftest.py"),
    *(".pre-commit-config.yaml", ".github", "disha", "tests", "docs", "benchmarks"),
)


def build(place: Path) -> None:
    """Build what `make build` builds, from a copy of the sources."""
    sources = place / "sources"
    sources.mkdir(parents=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, sources / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, sources)
    # With the tools that are here, not with what an index has today.
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", str(place / "dist"))
    subprocess.run(command, cwd=sources, check=True, capture_output=True)


@pytest.fixture(scope="session")
def dist(shared_folder) -> Path:
    """The folder with the sdist and the wheel."""
    return once(shared_folder, "built", build)[0] / "dist"


@pytest.fixture(scope="session")
def wheel(dist) -> Path:
    (found,) = dist.glob("*.whl")
    return found


@pytest.fixture(scope="session")
def sdist(dist) -> Path:
    (found,) = dist.glob("*.tar.gz")
    return found


@pytest.fixture(scope="session")
def installed(shared_folder, wheel) -> newcomer.Installed:
    """The environment; it takes most of a minute to make."""
    place, seconds = once(
        shared_folder, "environment", lambda folder: newcomer.install(wheel, folder).seconds
    )
    return newcomer.Installed(place / "bin" / "python", seconds)
