"""The README fits two screens, links to what exists, and has the figures of the kept results."""

import json
import re

from tests.pages import README, ROOT, links_of

TEXT = README.read_text(encoding="utf-8")
WORDS = " ".join(TEXT.split())


def page(name):
    return " ".join((ROOT / "docs" / name).read_text(encoding="utf-8").split())


def test_it_fits_two_screens_and_has_one_picture():
    assert len(TEXT.splitlines()) <= 105
    pictures = [link for link in links_of(TEXT) if link.endswith((".svg", ".png"))]
    assert pictures == ["docs/assets/compared.png"]


def test_every_link_leads_somewhere():
    links = {link.partition("#")[0] for link in links_of(TEXT) if "://" not in link} - {""}
    assert len(links) > 20
    assert [link for link in sorted(links) if not (ROOT / link).exists()] == []


def test_its_figures_are_those_of_the_kept_results():
    kept = json.loads((ROOT / "benchmarks/results/zoo.json").read_text(encoding="utf-8"))["results"]
    held = sum(result["status"] == "held" for result in kept)
    ran = sum(result["status"] != "not run" for result in kept)
    assert f"Of {len(kept)} architectures, {ran} run in a small form, and {held} pass" in WORDS
    pattern = r"keep ([\d.]+) MiB. MiSS adds ([\d.]+) MiB.* adds ([\d.]+) MiB"
    base, bone, lora = map(float, re.search(pattern, WORDS).groups())
    assert f"| frozen base | {base:g} MiB |" in page("performance.md")
    assert f"| disha MiSS | {base + bone:g} MiB |" in page("performance.md")
    assert f"| PEFT MiSS | {base + bone:g} MiB |" in page("performance.md")
    assert f"| PEFT LoRA | {base + lora:g} MiB |" in page("performance.md")
    here, there = re.search(r"up to ([\d.]+) times as much.* \[([\d.]+) times\]", WORDS).groups()
    assert f" to {here} times as much as LoRA" in page("evidence.md")
    assert f" and {there} times [in PEFT's comparison]" in page("evidence.md")
    pattern = r"([\d.]+) of the time and ([\d.]+) of the memory"
    time, memory = re.search(pattern, WORDS).groups()
    assert f"Time of a step: MiSS {time} " in page("evidence.md")
    assert f"Memory of a step: MiSS {memory} " in page("evidence.md")
    assert "no clear difference](docs/evidence.md) in quality; in one, it was worse" in WORDS
    assert "MiSS worse in 1," in page("evidence.md")
    assert "no clear difference" in page("evidence.md")
