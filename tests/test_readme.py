"""The README's Python runs as written and prints what the README says; it fits two screens."""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch

from tests.pages import README, blocks_of, links_of

TEXT = README.read_text(encoding="utf-8")
PYTHON = [block for block in blocks_of(TEXT) if block.language == "python"]
EXAMPLES = [(block.code, block.output) for block in PYTHON]
"""Each with what it prints; every one stands alone."""


def test_every_python_block_is_followed_by_its_output():
    assert len(EXAMPLES) == TEXT.count("```python")
    assert len(EXAMPLES) >= 1
    assert all(output for _, output in EXAMPLES)


@pytest.mark.parametrize("example", range(len(EXAMPLES)))
def test_example(example, tmp_path, monkeypatch, capsys):
    code, output = EXAMPLES[example]
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, f"README example {example + 1}", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out == output


def test_it_fits_two_screens_and_has_one_picture():
    assert len(TEXT.splitlines()) <= 90
    pictures = [link for link in links_of(TEXT) if link.endswith((".svg", ".png"))]
    assert pictures == ["docs/assets/compared.png"]


def test_its_figures_are_those_of_the_kept_results():
    zoo, performance, evidence, demo = (
        " ".join((README.parent / "docs" / name).read_text(encoding="utf-8").split())
        for name in ("features.md", "performance.md", "evidence.md", "finetuning.md")
    )
    text = " ".join(TEXT.split())
    ran, held = re.search(r"Of (\d+) architectures, (\d+) pass", text).groups()
    assert f"Of {ran} architectures, {held} pass" in zoo
    (refused,) = re.findall(r"the other (\d+) refuse to merge", text)
    assert f"The other {refused} refuse one step" in zoo
    (job,) = re.findall(r"peaks at ([\d.]+) times the memory", text)
    assert f"**Memory in training.** Whole job: Bone {job} (" in performance
    bone, lora = re.search(r"keep ([\d.]+ MiB); with LoRA they keep ([\d.]+ MiB)", text).groups()
    assert f"| disha Bone | {bone} |" in performance
    assert f"| PEFT LoRA | {lora} |" in performance
    assert "no clear difference from LoRA" in text
    assert "**Quality. Bone and BAT: no clear difference.**" in evidence
    assert "In five small tasks" in text
    assert "over 5 tasks" in evidence
    before, after, minutes = re.search(
        r"from ([\d.]+) to ([\d.]+) in about (\d+) minutes", text
    ).groups()
    assert f"from {before} to {after}" in demo
    assert f"the demo takes about {minutes} minutes" in demo


def test_every_figure_has_its_command():
    why = TEXT.split("## Why")[1].split("## Use")[0]
    commands = re.findall(r"\(`((?:make|python -m) [^`]+)`\)", why)
    targets = (README.parent / "Makefile").read_text(encoding="utf-8")
    for command in commands:
        words = command.split()
        if words[0] == "make":
            assert f"\n{words[1]}:" in targets
        else:
            assert importlib.util.find_spec(words[2]) is not None
    assert len(commands) == 4


def test_every_link_leads_somewhere():
    links = {link.partition("#")[0] for link in links_of(TEXT) if "://" not in link} - {""}
    assert len(links) > 20
    assert [link for link in sorted(links) if not (README.parent / link).exists()] == []
