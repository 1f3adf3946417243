"""Every block of code in the guides, the migration pages and some others runs as it stands.

Every promise in `guarantees.md` has a test, which the page names.
"""

from __future__ import annotations

import inspect
import re

import pytest

import disha
from disha.layers import kinds
from tests.pages import DOCS, ROOT, Page

ALONE = [DOCS / "choosing.md", DOCS / "mechanism.md"]
PAGES = sorted([*DOCS.glob("guides/*.md"), *DOCS.glob("migrating/*.md"), *ALONE])
NAMES = [str(page.relative_to(DOCS)) for page in PAGES]


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_code_runs_and_prints_what_the_page_says(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kinds, "LAYER_KINDS", dict(kinds.LAYER_KINDS))
    for block, printed in Page(path).run():
        if block.output is not None:
            assert printed == block.output, f"line {block.line}"


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_every_text_block_is_the_output_of_code(path):
    page = Page(path)
    assert page.text.count("```text") == sum(block.output is not None for block in page.blocks)
    assert any(block.output for block in page.blocks)


def test_the_serving_page_says_of_every_function_what_it_is_safe_beside():
    page = (DOCS / "guides" / "serving.md").read_text(encoding="utf-8")
    rows = page.split("## What is safe beside a forward")[1].splitlines()
    cells = [row.split("|")[1] for row in rows if row.startswith("| `")]
    named = {name for cell in cells for name in re.findall(r"`(\w+)", cell)}
    functions = {name for name in disha.__all__ if inspect.isfunction(getattr(disha, name))}
    assert named - {"replace", "activate"} == functions


class TestGuarantees:
    TEXT = (DOCS / "guarantees.md").read_text(encoding="utf-8")
    SECTIONS = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:-1]
    FOLD = '<details markdown="1"><summary>The tests of this section</summary>'
    TEST = re.compile(r"`(tests/[\w/]+\.py)::(?:(\w+)::)?(\w+)`")

    @pytest.mark.parametrize("section", SECTIONS, ids=[one.split("\n")[0] for one in SECTIONS])
    def test_every_promise_names_a_test_that_exists(self, section):
        promises, fold = (re.split(r"^- ", part, flags=re.M) for part in section.split(self.FOLD))
        titles = [re.match(r"\*\*(.+?)[.:,]?\*\*", one, re.DOTALL)[1] for one in promises[1:]]
        named = [one.partition(":\n") for one in fold[1:]]
        assert [" ".join(one.split()) for one in titles] == [
            " ".join(title.split()) for title, _, _ in named
        ]
        for title, _, tests in named:
            assert self.TEST.search(tests), title
            for file, group, name in self.TEST.findall(tests):
                code = (ROOT / file).read_text(encoding="utf-8")
                inside = rf"^class {group}\b(?:(?!^class ).)*?^    " if group else "^"
                found = re.search(rf"{inside}def {name}\(", code, re.DOTALL | re.MULTILINE)
                assert found, (file, group, name)

    def test_there_are_many(self):
        assert self.TEXT.count("\n- **") >= 60
        assert self.TEXT.split("\n## ")[-1].startswith("Not promised\n")
