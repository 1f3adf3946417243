"""The code of the pages runs as it stands, and prints what they say."""

import re
import tempfile
from unittest.mock import patch

import pytest

from disha.functional import METHODS
from disha.layers import kinds
from tests.pages import DOCS, ROOT, Page

ALONE = ["README.md", "CONTRIBUTING.md"]
ALONE += [
    f"docs/{name}.md" for name in ("index", "choosing", "mathematics", "mechanism", "migrating")
]
ELSEWHERE = DOCS / "guides" / "tutorial.md"  # tests/finetune/test_page.py runs its commands
PAGES = sorted({*DOCS.glob("guides/*.md"), *(ROOT / name for name in ALONE)} - {ELSEWHERE})
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_code_runs_and_prints_what_the_page_says(path, monkeypatch):
    page = Page(path)
    assert page.text.count("```text") == sum(block.output is not None for block in page.blocks)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        patch.dict(kinds.LAYER_KINDS),
        patch.dict(METHODS),
    ):
        monkeypatch.chdir(folder)
        for block, printed in page.run():
            if block.output is not None:
                assert printed == block.output, f"line {block.line}"
        monkeypatch.undo()


def test_every_promise_names_its_tests():
    text = (DOCS / "stability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \*\*.*$", text, re.MULTILINE)
    assert len(rows) >= 25
    modules = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    for row in rows:
        names = re.findall(r"`(test_\w+)`", row.rpartition(". |")[2])
        assert names, row
        assert set(names) <= modules, row
