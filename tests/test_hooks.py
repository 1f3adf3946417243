"""What the hooks of the site do: links to code and out of docs/, formulas, the version."""

from __future__ import annotations

import pytest
from mkdocs.config import load_config
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import disha
from docs.hooks import formulas, outside, version


@pytest.fixture(scope="module")
def config():
    config = load_config(str(outside.ROOT / "mkdocs.yml"))
    config.plugins._current_plugin = "outside"  # as MkDocs has it while it runs a hook
    return config


def page_of(config, path, text=None):
    file = File.generated(config, path, content=text or "")
    return Page(None, file, config)


def rewritten(config, path, text):
    files = Files([])
    return outside.on_page_markdown(text, page=page_of(config, path), config=config, files=files)


@pytest.mark.parametrize(
    ("page", "link", "on_site"),
    [
        ("security.md", "../tests/reference.py", "source/tests/reference.py.txt"),
        ("reference/files.md", "../../setup.py#L1", "../source/setup.py.txt#L1"),
        ("index.md", "drawings/landing.py", "source/docs/drawings/landing.py.txt"),
        ("security.md", "../CHANGELOG.md#unreleased", "changelog.md#unreleased"),
        ("reference/files.md", "../../README.md", "../index.md"),
        ("changelog.md", "docs/format.md#keys", "format.md#keys"),
        ("changelog.md", "README.md", "index.md"),
        ("security.md", "format.md", "format.md"),
        ("reference/files.md", "../format.md", "../format.md"),
        ("security.md", "../tests/nowhere.py", "../tests/nowhere.py"),
        ("security.md", "https://arxiv.org/abs/2409.15371", "https://arxiv.org/abs/2409.15371"),
    ],
)
def test_a_link_leads_to_what_stands_for_its_file(config, page, link, on_site):
    assert rewritten(config, page, f"See [it]({link}).") == f"See [it]({on_site})."


def test_nothing_outside_of_the_repository_comes_onto_the_site(config, tmp_path, monkeypatch):
    (tmp_path / "outside.txt").write_text("x")
    (tmp_path / "root").mkdir()
    monkeypatch.setattr(outside, "ROOT", tmp_path / "root")
    text = f"[a](../../outside.txt), [b]({tmp_path}/outside.txt)"
    files = Files([page_of(config, "security.md", text).file])
    added = outside.on_files(files, config=config)
    assert [file.src_uri for file in added] == ["security.md"]
    assert rewritten(config, "security.md", text) == text


def test_what_pages_link_to_comes_onto_the_site(config):
    text = "[a](../tests/reference.py), [b](../README.md), [c](../tests/nowhere.py), [d](cli.md)"
    files = Files([page_of(config, "security.md", text).file])
    added = outside.on_files(files, config=config)
    assert {file.src_uri for file in added} - {"contributing.md"} == {
        "changelog.md",
        "security.md",
        "source/tests/reference.py.txt",
    }
    source = added.get_file_from_path("source/tests/reference.py.txt")
    assert source.content_string == (outside.ROOT / "tests/reference.py").read_text()


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ('<span class="arithmatex">\\(a &lt; b\\)</span>', ["inline", "<mo>&#x0003C;</mo>"]),
        ('<div class="arithmatex">\\[\nD_{i \\bmod r}\n\\]</div>', ["block", "<mi>D</mi>", "mod"]),
    ],
)
def test_a_formula_becomes_mathml(config, found, expected):
    typeset = formulas.on_page_content(found, page=None, config=config, files=Files([]))
    for part in expected:
        assert part in typeset
    assert "arithmatex" not in typeset
    assert "\\" not in typeset


def test_the_version_is_that_of_the_library(config):
    assert (
        version.on_config(config).copyright == f"{config.site_name} {disha.__version__}, Apache-2.0"
    )
