"""What must hold before a release: the package page, the tag, and the workflows."""

import re
import runpy
import shutil
import subprocess
import sys

import pytest
import yaml

import disha
from tests.pages import DOCS, ROOT

READY = runpy.run_path(str(ROOT / ".github" / "ready.py"))
metadata, reasons_against = READY["metadata"], READY["reasons_against"]
TAG = f"v{disha.__version__}"
CHANGES = f"# Changelog\n\n## [{disha.__version__}] - 2026-12-01\n"
ADDRESS = "https://example.org/somebody/disha"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return a function that builds a wheel with this address of the repository and this email."""

    def build(address, email):
        place = tmp_path_factory.mktemp("tree")
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, place)
        (place / "disha").mkdir()
        for name in ("__init__.py", "version.py"):
            shutil.copy(ROOT / "disha" / name, place / "disha")
        setup = (ROOT / "setup.py").read_text(encoding="utf-8")
        setup = re.sub(r'^ADDRESS = ".*?"', f'ADDRESS = "{address}"', setup, flags=re.MULTILINE)
        setup = re.sub(r'^EMAIL = ".*?"', f'EMAIL = "{email}"', setup, flags=re.MULTILINE)
        (place / "setup.py").write_text(setup, encoding="utf-8")
        command = (sys.executable, "-m", "build", "--no-isolation", "--wheel", str(place))
        subprocess.run(command, check=True, capture_output=True)
        return next((place / "dist").glob("*.whl"))

    return build


@pytest.fixture(scope="module")
def ready(built):
    return built(ADDRESS, "somebody@example.org")


def test_without_an_address_nothing_is_published_and_no_link_is_broken(built):
    wheel = built("", "")
    page = metadata(wheel).get_payload()
    assert "](docs" not in page
    assert "![" not in page
    assert "[arXiv 2409.15371](https://arxiv.org" in page
    nobody = "setup.py names no one: fill in EMAIL and ADDRESS"
    assert reasons_against(TAG, wheel, CHANGES) == [nobody]


def test_with_an_address_the_package_page_links_to_the_files_of_its_version(ready):
    fields = metadata(ready)
    assert fields["Author-email"] == "somebody@example.org"
    assert fields["Project-URL"] == f"Repository, {ADDRESS}"
    page = fields.get_payload()
    assert f"]({ADDRESS}/raw/{TAG}/docs/assets/compared.png)" in page
    assert f"]({ADDRESS}/blob/{TAG}/docs/choosing.md#method)" in page
    assert reasons_against(TAG, ready, CHANGES) == []


@pytest.mark.parametrize(
    ("tag", "changes", "reason"),
    [
        ("v0.9.0", CHANGES, f"the tag is v0.9.0, and the version is {disha.__version__}"),
        (TAG, "## [Unreleased]", "CHANGELOG.md has no section for"),
        (TAG, f"## [{disha.__version__}]", "CHANGELOG.md has no section for"),
    ],
)
def test_a_release_that_is_not_ready_is_refused(ready, tag, changes, reason):
    (found,) = reasons_against(tag, ready, changes)
    assert reason in found


def test_the_package_page_renders(ready):
    command = (sys.executable, "-m", "twine", "check", "--strict", str(ready))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_action_is_named_by_its_commit():
    workflows = [path.read_text() for path in (ROOT / ".github/workflows").glob("*.yml")]
    actions = [action for text in workflows for action in re.findall(r"uses: (\S+)", text)]
    assert len(actions) > 10
    assert [one for one in actions if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", one)] == []
    assert all(yaml.safe_load(text)["jobs"] for text in workflows)


def test_one_author_is_named_everywhere():
    author = re.search(r'AUTHOR = "(.+?)"', (ROOT / "setup.py").read_text())[1]
    license = (ROOT / "LICENSE").read_text()
    assert re.search(rf"^   Copyright \d{{4}} {author}$", license, re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["authors"] == [{"name": author}]


def test_no_page_installs_the_other_project():
    for page in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]:
        found = re.findall(
            r"(?:pip|uv)[^`\n]* install [^`\n]*\bdisha\b(?!-torch)", page.read_text()
        )
        assert found == [], page
