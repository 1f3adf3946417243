"""What the README claims: its figures are those of the kept results, its links lead somewhere."""

import json
import re

import peft
import pytest
import torch

from docs.hooks.address import ADDRESS
from tests.pages import README, ROOT, blocks_of, links_of, tables_of

TEXT = README.read_text(encoding="utf-8")
INDEX = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
WORDS = " ".join(TEXT.split())


def page(name):
    return " ".join((ROOT / "docs" / name).read_text(encoding="utf-8").split())


def cells(row):
    """Return the cells of a row of the table beside PEFT, by the beginning of its first cell."""
    (found,) = (line for line in tables_of(TEXT)[0] if line[0].startswith(row))
    return found[1:]


def test_its_first_screens_have_the_example_the_table_the_install_line_and_the_limits():
    first = "\n".join(TEXT.splitlines()[:115])
    for what in ("```python", "```text", "## Compared with PEFT", "## Install", "What to know"):
        assert what in first
    pictures = [link for link in links_of(TEXT) if link.endswith((".svg", ".png"))]
    assert pictures == ["docs/assets/compared.png"]


@pytest.mark.parametrize("text", [TEXT, INDEX])
def test_both_first_pages_warn_of_the_other_package_and_say_what_was_not_run(text):
    words = " ".join(text.split())
    assert "The package `disha` is another project" in words
    assert ("No GPU has run this yet" in words) == ("No GPU has run this yet" in WORDS)
    assert "independent implementation" in words
    assert not ADDRESS or f"git clone {ADDRESS}" in words


def test_every_link_leads_somewhere():
    links = {link.partition("#")[0] for link in links_of(TEXT) if "://" not in link} - {""}
    assert len(links) > 20
    assert [link for link in sorted(links) if not (ROOT / link).exists()] == []


def test_peft_refuses_what_the_example_adapts():
    code = blocks_of(TEXT)[0].code.partition("\nmodel, x")[0]
    scope = {}
    exec(code, scope)
    for config in (
        peft.LoraConfig(target_modules=["gru", "head"]),
        peft.MissConfig(target_modules=["gru", "head"]),
        peft.LoraConfig(target_parameters=["mix"]),
    ):
        with pytest.raises((ValueError, TypeError), match="is not supported"):
            peft.get_peft_model(scope["Tagger"](), config)


def test_peft_un_merges_by_subtracting_and_disha_restores_every_bit():
    code = blocks_of(TEXT)[0].code.partition("\nmodel, x")[0]
    scope = {}
    exec(code, scope)
    model = scope["Tagger"]()
    theirs = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["head"], init_lora_weights=False)
    )
    before = theirs.base_model.model.head.weight.detach().clone()
    for _ in range(20):
        theirs.merge_adapter()
        theirs.unmerge_adapter()
    assert not torch.equal(theirs.base_model.model.head.weight, before)
    disha = scope["disha"]
    ours = disha.inject_adapters(scope["Tagger"](), "head", r=4, init="kaiming")
    before = ours.head.base_weight.detach().clone()
    for _ in range(20):
        disha.merge_adapters(ours)
        disha.unmerge_adapters(ours)
    assert torch.equal(ours.head.base_weight, before)


def test_its_figures_are_those_of_the_kept_results():
    kept = json.loads((ROOT / "benchmarks/results/zoo.json").read_text(encoding="utf-8"))["results"]
    held = sum(result["status"] == "held" for result in kept)
    ran = sum(result["status"] != "not run" for result in kept)
    untried, refused = len(kept) - ran, ran - held
    assert f"Of {len(kept)} architectures, {untried} could not be built small" in WORDS
    assert f"Of the other {ran}, {held} pass every step; {refused} audio models train" in WORDS
    pattern = r"keep ([\d.]+) MiB, MiSS adds ([\d.]+) MiB.* adds ([\d.]+) MiB"
    base, miss, lora = map(float, re.search(pattern, WORDS).groups())
    tables = page("../benchmarks/results/speed.md")
    assert f"| frozen base | {base:g} MiB |" in tables
    assert f"| disha MiSS | {base + miss:g} MiB |" in tables
    assert f"| PEFT MiSS | {base + miss:g} MiB |" in tables
    assert f"| PEFT LoRA | {base + lora:g} MiB |" in tables
    here, there = re.search(
        r"up to ([\d.]+) times as much here, and ([\d.]+) times", WORDS
    ).groups()
    assert f" to {here} times as much as LoRA" in page("evidence.md")
    assert f" and {there} times [in PEFT's comparison]" in page("evidence.md")
    assert cells("forgetting")[0].endswith(f" to {here}")
    assert "MiSS worse in 1," in page("evidence.md")
    assert "no clear difference" in page("evidence.md")


def test_its_table_compares_like_with_like():
    """The steps of a whole model, and what is kept for backward, as the page of speed has them."""
    words = page("performance.md")
    ours, _, theirs = (cell.split(" / ") for cell in cells("a training step of SmolLM2-135M"))
    for place, dtype in enumerate(("float32", "bfloat16")):
        told = re.search(rf"SmolLM2-135M, {dtype}: MiSS ([\d.]+) .*?PEFT MiSS ([\d.]+) ", words)
        assert told.groups() == (ours[place], theirs[place])
    kept = re.search(
        r"Kept for backward by 4 layers: MiSS ([\d.]+), .*?PEFT MiSS ([\d.]+\d)", words
    )
    assert list(kept.groups()) == [cells("memory kept")[0], cells("memory kept")[2]]
