"""What people find around the code: hooks, workflows, templates, changelog, citation."""

from __future__ import annotations

import re
import shlex
from unittest.mock import patch

import pytest
import torch
import yaml
from torch import nn

import disha
from disha.functional.methods import METHODS
from disha.layers import LAYER_KINDS
from tests.conftest import perturb
from tests.packaging.conftest import ROOT
from tests.pages import Page

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z][\w-]*):", MAKEFILE, re.MULTILINE))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def loaded(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def recipe(target):
    """Return the commands of a target, with the virtual environment's place filled in."""
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    return [line.strip().replace("$(BIN)", ".venv/bin") for line in found.group(1).splitlines()]


# --- make, workflows, hooks ----------------------------------------------------------------------


def test_every_target_is_declared_to_be_no_file():
    declared = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)$", MAKEFILE, re.MULTILINE).group(1)
    assert set(declared.replace("\\\n", " ").split()) == TARGETS


def runs(workflow):
    """Yield the commands of a workflow."""
    for job in loaded(workflow)["jobs"].values():
        for step in job["steps"]:
            if "run" in step:
                yield from filter(None, map(str.strip, step["run"].splitlines()))


def assert_runs(command):
    """Assert that a command is `make` with targets, or `python -m` with a module, that exist."""
    program, *words = shlex.split(command)
    if program == "make":
        assert set(words) <= TARGETS, command
    else:
        assert (program, words[0]) == ("python", "-m"), command
        place = ROOT.joinpath(*words[1].split("."))
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), command


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_nothing_but_commands_that_exist(workflow):
    commands = list(runs(workflow))
    assert commands
    for command in commands:
        assert_runs(command)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_may_read_only_and_name_their_actions_releases(workflow):
    content = loaded(workflow)
    assert content["permissions"] == {"contents": "read"}
    for job in content["jobs"].values():
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            assert "uses" not in step or re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])


def test_every_day_runs_lint_tests_coverage_and_the_build():
    commands = set(runs(ROOT / ".github/workflows/ci.yml"))
    assert {"make lint", "make test", "make coverage", "make build"} <= commands
    assert "python -m tests.packaging.newcomer" in commands


def test_all_declared_pythons_are_tested():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    declared = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', setup)
    test = loaded(ROOT / ".github/workflows/ci.yml")["jobs"]["test"]
    assert test["strategy"]["matrix"]["python"] == declared


def test_hooks_run_the_tools_of_the_lint_in_the_same_way():
    (repository,) = loaded(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"  # of .venv: no second place for versions
    entries = [hook["entry"] for hook in repository["hooks"]]
    assert entries == [command.removesuffix(" .") for command in recipe("lint")]


# --- templates -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms_are_complete(name):
    form = loaded(ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml")
    assert {"name", "description", "body"} <= form.keys()
    identifiers = [field["id"] for field in form["body"]]
    assert len(set(identifiers)) == len(identifiers)
    for field in form["body"]:
        assert field["type"] in {"textarea", "input", "dropdown", "checkboxes"}
        assert field["attributes"]["label"]
    assert any(field.get("validations", {}).get("required") for field in form["body"])


def test_pull_requests_are_asked_for_what_a_change_has_to_pass():
    text = (ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`make ([\w-]+)`", text)) == {"lint", "test"}


# --- changelog -----------------------------------------------------------------------------------

KINDS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]


def changelog_errors(text):
    """Return what is not in the form of Keep a Changelog."""
    errors = []
    if not text.startswith("# Changelog\n"):
        errors.append("no title")
    releases = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    headings = [release.partition("\n")[0] for release in releases]
    if headings[:1] != ["[Unreleased]"]:
        errors.append("no [Unreleased] at the top")
    form = r"\[(\d+)\.(\d+)\.(\d+)\] - (\d{4}-\d{2}-\d{2})( \[YANKED\])?"
    found = [re.fullmatch(form, heading) for heading in headings[1:]]
    errors += [f"## {h}" for h, match in zip(headings[1:], found, strict=True) if match is None]
    versions = [(*map(int, match.groups()[:3]), match[4]) for match in found if match]
    if versions != sorted(set(versions), reverse=True):
        errors.append("releases are not in order")
    for release in releases:
        title, *sections = re.split(r"^### ", release, flags=re.MULTILINE)
        kinds = [section.partition("\n")[0] for section in sections]
        if kinds != [kind for kind in KINDS if kind in kinds]:
            errors.append(f"{title.splitlines()[0]}: {kinds}")
        for section in sections:
            lines = section.partition("\n")[2].strip().splitlines()
            if not lines or not all(re.match(r"- \S|  \S", line) for line in lines):
                errors.append(f"{section.splitlines()[0]} is no list")
    return errors


def test_the_changelog_has_its_form():
    assert changelog_errors(CHANGELOG) == []


@pytest.mark.parametrize(
    ("before", "after", "error"),
    [
        ("# Changelog\n", "# Changes\n", "no title"),
        ("## [Unreleased]", "## [0.2.0] - 2026-01-01", "no [Unreleased] at the top"),
        ("### Added", "### New", "[Unreleased]: ['New']"),
        ("### Added\n", "### Added\n\nSome prose.\n", "Added is no list"),
        ("### Added", "## 0.1\n\n### Added", "## 0.1"),
    ],
)
def test_another_form_is_noticed(before, after, error):
    text = "# Changelog\n\n## [Unreleased]\n\n### Added\n\n- One thing,\n  in two lines.\n"
    assert changelog_errors(text) == []
    assert error in changelog_errors(text.replace(before, after, 1))


def test_releases_out_of_order_are_noticed():
    text = "# Changelog\n\n## [Unreleased]\n\n## [0.9.0] - 2026-01-02\n\n## [0.10.0] - 2026-01-03\n"
    assert changelog_errors(text) == ["releases are not in order"]


# --- citation ------------------------------------------------------------------------------------

REFERENCE_TYPES = {"article", "conference-paper", "software", "report", "thesis", "generic"}


def test_the_citation_is_valid():
    """By the required fields and the types of version 1.2.0 of the format's schema."""
    citation = loaded(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["type"] in {"software", "dataset"}
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert paper["type"] in REFERENCE_TYPES
    for work in (citation, paper):
        for author in work["authors"]:
            assert author.keys() <= {"family-names", "given-names"} or author.keys() == {"name"}
        for identifier in work.get("identifiers", ()):
            assert identifier["type"] in {"doi", "url", "swh", "other"}
            assert identifier.keys() <= {"type", "value", "description"}
    assert isinstance(paper["year"], int)


def test_the_citation_says_what_the_package_and_the_readme_do():
    citation = loaded(ROOT / "CITATION.cff")
    assert str(citation["version"]) == disha.__version__
    assert citation["license"] == "Apache-2.0"
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    paper = citation["preferred-citation"]
    assert paper["title"] in readme
    assert paper["url"] in readme
    assert paper["authors"]
    for author in paper["authors"]:
        assert f"{author['given-names']} {author['family-names']}" in readme


# --- CONTRIBUTING.md -----------------------------------------------------------------------------


def test_every_command_that_is_named_exists():
    named = set(re.findall(r"`((?:make|python -m) [\w. -]+)`", CONTRIBUTING))
    named |= set(re.findall(r"^((?:make|python -m) [\w. -]+)", CONTRIBUTING, re.MULTILINE))
    assert {"make hooks", "make test", "make lint", "python -m tests.mutation"} <= named
    for command in named:
        if not command.startswith(("python -m pytest", "python -m build")):
            assert_runs(command)


def test_every_path_that_is_named_exists():
    named = set(re.findall(r"`((?:tests|disha|docs)/[\w/.-]+)`", CONTRIBUTING))
    assert len(named) >= 10
    for path in named:
        assert (ROOT / path).exists(), path


def test_every_benchmark_that_is_named_exists():
    main = (ROOT / "benchmarks" / "__main__.py").read_text(encoding="utf-8")
    tables = re.findall(r'^    "(\w+)": \w+,$', main, re.MULTILINE)
    sentence = re.search(r"The tables are (.*?)\.\n", CONTRIBUTING, re.DOTALL).group(1)
    assert re.findall(r"`(\w+)`", sentence) == tables
    assert set(re.findall(r"--only (\w+)", CONTRIBUTING)) <= set(tables)


@pytest.fixture
def contributed():
    """What the code of CONTRIBUTING.md defines, run block by block, and what each block printed."""
    with patch.dict(LAYER_KINDS), patch.dict(METHODS):
        page = Page(ROOT / "CONTRIBUTING.md")
        printed = [(block, said) for block, said in page.run() if block.language == "python"]
        yield vars(page.main), printed


def test_the_layer_kind_and_the_method_work_and_print_what_they_say(contributed):
    _, printed = contributed
    assert len(printed) == 2
    for block, said in printed:
        assert said == block.output


@pytest.mark.parametrize("method", ["bone", "bat", "rescaled"])
def test_the_layer_kind_and_the_method_can_do_what_is_said_of_them(contributed, method, tmp_path):
    names, _ = contributed
    base, plain = nn.Sequential(names["Heads"](2, 6)), nn.Sequential(names["Heads"](2, 6))
    plain.load_state_dict(base.state_dict())
    x = torch.randn(5, 2, 6)
    before = base(x)
    model = disha.inject_adapters(base, "all-linear", r=4, method=method)
    assert torch.equal(model(x), before)
    model(x).sum().backward()
    assert all(block.grad.abs().sum() > 0 for block in disha.adapter_parameters(model))
    perturb(model)
    expected = model(x)
    assert not torch.allclose(expected, before, atol=1e-3)
    disha.save_adapter(model, tmp_path / "a")
    disha.load_adapter(plain, tmp_path / "a")
    assert torch.equal(plain(x), expected)
    disha.merge_adapters(model)
    assert torch.allclose(model(x), expected, atol=1e-5)
    disha.unmerge_adapters(model)
    assert torch.equal(model(x), expected)
    plain_mix, full_mix = base[0]._parameters["mix"], base[0].mix * 1
    disha.set_adapter_scale(model, 0.5)
    assert torch.allclose(base[0].mix * 1, (plain_mix + full_mix) / 2, atol=1e-5)
    disha.remove_adapters(model)
    assert torch.equal(model(x), before)
