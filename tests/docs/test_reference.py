"""The reference has every public name exactly once; the code of the first pages runs."""

import importlib
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent.parent / "docs"
MODULES = (
    "disha",
    "disha.functional",
    "disha.integrations.accelerate",
    "disha.integrations.lightning",
    "disha.integrations.transformers",
    "disha.integrations.trl",
    "disha.interop.checkpoints",
    "disha.interop.image_lora",
    "disha.interop.lora",
    "disha.interop.peft",
)
EXPORTS = {
    name: [f"{name}.{one}" for one in importlib.import_module(name).__all__] for name in MODULES
}
EXPORTS["disha.config"] = ["disha.config.AdapterConfig"]  # of plans and files
PUBLIC = [one for names in EXPORTS.values() for one in names]
REFERENCE = sorted(DOCS.glob("reference/*.md"))
EXAMPLE = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)


def text_of(page):
    return (DOCS / page).read_text(encoding="utf-8")


def test_every_public_name_stands_on_one_page_once():
    pages = [page.read_text(encoding="utf-8") for page in REFERENCE]
    named = [name for page in pages for name in re.findall(r"^::: (.+)$", page, re.M)]
    # A page names a module whole, or each of its names.
    shown = Counter(one for name in named for one in (EXPORTS.get(name) or [name]))
    assert shown == Counter(PUBLIC)


def test_the_first_page_of_the_reference_lists_the_others():
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", text_of("reference/index.md")))
    assert linked == {page.name for page in REFERENCE} - {"index.md"}


def test_the_glossary_is_sorted_and_has_the_words_that_differ_elsewhere():
    terms = re.findall(r"^(\S.*)\n:   ", text_of("glossary.md"), re.M)
    assert terms == sorted(terms, key=str.casefold)
    assert {"BAT", "Block", "Bone", "MiSS", "Shard", "Tile", "r"} <= set(terms)


@pytest.mark.parametrize("page", ["index.md", "mathematics.md"])
def test_the_code_of_a_page_prints_what_it_says(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    examples, namespace = EXAMPLE.findall(text_of(page)), {"__name__": "__main__"}
    assert len(examples) == text_of(page).count("```python")
    for code, output in examples:
        exec(compile(code, page, "exec"), namespace)
        assert capsys.readouterr().out == output
