"""The built site in a browser, and what its pages take from files that are kept elsewhere."""

import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM
from trl.generation import vllm_generation

import disha
from disha.finetune.arguments import parse_flags
from docs.screens import DESK, PROGRAMS, WIDTHS, build, chrome, main, resize, served
from tests.pages import DOCS, ROOT, links_of, tables_of

LOOK = """
for (const one of document.querySelectorAll("details")) one.open = true;
const right = one => one.getBoundingClientRect().right;
const isCut = one => {
  for (let box = one; box.tagName !== "ARTICLE"; box = box.parentElement) {
    const flow = getComputedStyle(box).overflowX;
    if (flow === "auto" || flow === "scroll") return false;
    if (flow !== "visible" && right(one) > right(box) + 1) return true;
  }
  return right(one) > innerWidth + 1;
};
const shown = [...document.querySelectorAll("article :is(table, pre, img, .formula)")];
return {
  width: document.documentElement.scrollWidth,
  cut: shown.filter(isCut).map(one => one.outerHTML.slice(0, 200)),
  broken: [...document.images].filter(one => !one.naturalWidth).map(one => one.src),
};
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build(folder)
    return folder


@pytest.mark.skipif(
    None in map(shutil.which, PROGRAMS) and "GITHUB_ACTIONS" not in os.environ,
    reason="no browser: this test needs `chromium` and `chromedriver` on the PATH",
)
def test_on_every_page_nothing_is_cut_and_every_picture_loads(site):
    """At a desk and on a phone, with all folds open; nothing is asked of a network."""
    pages = sorted(path.parent.relative_to(site) for path in site.rglob("index.html"))
    wrong = {}
    with served(site) as address, chrome() as browser:
        browser.execute_cdp_cmd("Network.enable", {})
        browser.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*/search/*"]})  # half the time
        for page in pages:
            for width in WIDTHS:
                resize(browser, width)
                if width == DESK:
                    browser.get(urljoin(address, f"{page}/"))
                seen = browser.execute_script(LOOK)
                if seen["width"] > width or seen["cut"] or seen["broken"]:
                    wrong[f"{page} at {width}"] = seen
        log = [json.loads(one["message"])["message"] for one in browser.get_log("performance")]
    sent = [one["params"] for one in log if one["method"] == "Network.requestWillBeSent"]
    asked = {urlsplit(one["request"]["url"]) for one in sent}
    assert len(pages) > 30
    assert wrong == {}
    assert {one.netloc for one in asked if one.scheme.startswith("http")} == {
        urlsplit(address).netloc
    }


def test_pictures_without_a_browser(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.argv", ["screens", str(tmp_path)])
    with pytest.raises(SystemExit, match="no browser: install chromium and chromedriver"):
        main()


def test_formulas_are_typeset(site):
    pages = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    assert pages[site / "mathematics" / "index.html"].count("<math ") >= 30
    assert [path for path, text in pages.items() if "arithmatex" in text] == []


def test_the_page_says_what_the_zoo_found():
    kept = json.loads((ROOT / "benchmarks/results/zoo.json").read_text(encoding="utf-8"))
    counts = Counter(result["status"] for result in kept["results"])
    ran = counts["held"] + counts["refused"]
    assert ran + counts["not run"] == len(kept["results"])
    page = " ".join((DOCS / "compatibility.md").read_text(encoding="utf-8").split())
    assert f"Of {len(kept['results'])} architectures, {ran} run in a small form" in page
    assert f"{counts['held']} of them pass, and {counts['refused']} refuse one step" in page
    held = [result for result in kept["results"] if result["status"] == "held"]
    reached = sum(not result["unused"] for result in held)
    assert f"In {reached} of the {len(held)}, every adapter acted" in page
    assert f"In the other {len(held) - reached}, some weights are not reached" in page


def test_the_page_names_the_models_that_refuse_to_merge():
    kept = json.loads((ROOT / "benchmarks/results/zoo.json").read_text(encoding="utf-8"))
    refused = [result for result in kept["results"] if result["status"] == "refused"]
    assert all("merge_adapters" in result["reasons"][0] for result in refused)
    page = (DOCS / "compatibility.md").read_text(encoding="utf-8").lower()
    names = [result["name"].lower().removeprefix("autoencoder") for result in refused]
    assert [name for name in names if name.partition("-")[0] not in page] == []


@pytest.mark.parametrize("name", ["compatibility.md", "guides/memory.md"])
def test_every_table_that_a_program_writes_is_there(name):
    page = (DOCS / name).read_text(encoding="utf-8")
    marks = r"<!-- (?:written by|table:) .*? -->"
    written = re.findall(rf"{marks}(.*?)<!-- end.*? -->", page, re.DOTALL)
    assert len(written) == len(re.findall(marks, page)) > 0
    for region in written:
        _, *rows = tables_of(region)[0]
        assert rows


def test_the_page_of_quantised_models_says_what_only_stand_ins_have_tested():
    page = (DOCS / "guides" / "quantised.md").read_text(encoding="utf-8")
    (row,) = (line for line in page.splitlines() if line.startswith("| modules that pack"))
    assert all(name in row for name in ("GPTQ", "AWQ", "HQQ"))
    assert row.endswith("| stand-ins |")


def test_the_serving_page_says_of_every_function_what_it_is_safe_beside():
    page = (DOCS / "guides" / "many-adapters.md").read_text(encoding="utf-8")
    rows = page.split("## Thread safety")[1].splitlines()
    cells = [row.split("|")[1] for row in rows if row.startswith("| `")]
    named = {name for cell in cells for name in re.findall(r"`(\w+)", cell)}
    functions = {name for name in disha.__all__ if name.islower() and "__" not in name}
    assert named - {"replace", "activate"} == functions


@pytest.mark.parametrize(
    ("size", "shape", "swept"),
    [
        ("135 million", (576, 1536, 30, 9, 3), None),
        ("1 billion", (2048, 8192, 16, 32, 8), 1e-3),
        ("8 billion", (4096, 14336, 32, 32, 8), 3e-4),
        ("70 billion", (8192, 28672, 80, 64, 8), 3e-4),
    ],
)
def test_the_table_of_rates_is_what_plans_and_the_fit_of_others_give(size, shape, swept):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads")  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **dict(zip(names, shape, strict=True))))
    page = (DOCS / "choosing.md").read_text(encoding="utf-8")
    (row,) = (line for table in tables_of(page) for line in table if line[0] == size)
    settings = [{}, {"groups": 2}, {"groups": "all"}, {"method": "lora", "r": 32}]
    plans = [
        disha.plan_adapters(model, "all-linear", **{"r": 64, "exclude": "lm_head", **one})
        for one in settings
    ]
    assert [float(told) for told in row[1:5]] == [float(f"{plan.rate:.1e}") for plan in plans]
    others = [f"{5e-4 * (2000 / shape[0]) ** 0.781:.1e}", swept]
    assert [float(one) for one in row[5:] if one != "-"] == [float(one) for one in others if swept]


def test_every_picture_stands_on_one_page():
    pages = [ROOT / "README.md", *DOCS.rglob("*.md")]
    linked = [Path(link).name for page in pages for link in links_of(page.read_text("utf-8"))]
    pictures = Counter(name for name in linked if name.endswith((".svg", ".png")))
    assert [name for name, count in pictures.items() if count > 1] == []
    assert len(pictures) > 10


def test_what_merging_costs_is_what_was_measured():
    rows = tables_of((ROOT / "benchmarks/results/drift.md").read_text(encoding="utf-8"))[0]
    lora, miss = (
        next(row[2:4] for row in rows if row[:2] == ["bfloat16", name])
        for name in ("PEFT LoRA", "PEFT MiSS")
    )
    page = " ".join((DOCS / "guides" / "preference.md").read_text(encoding="utf-8").split())
    assert f"PEFT's LoRA changed {lora[0]} of the weights, by {lora[1]} of their mean size" in page
    assert f"its MiSS {miss[0]}, by {miss[1]}" in page


def test_trl_merges_what_it_sends_to_vllm():
    page = " ".join((DOCS / "guides" / "preference.md").read_text(encoding="utf-8").split())
    assert "`GRPOTrainer` of `trl` merges an adapter of PEFT into the base" in page
    source = inspect.getsource(vllm_generation.VLLMGeneration._iter_named_params)
    assert source.index(".merge_adapter()") < source.index(".unmerge_adapter()")


def test_the_study_at_1b_is_ready():
    """Its flags are those of the command, and its operations are what the page says."""
    page = (DOCS / "evidence.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^```sh\n(task=.*?)^```", page, re.M | re.S)
    script = script.replace("disha finetune", "echo")
    printed = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    runs = [parse_flags(shlex.split(line)) for line in printed.stdout.splitlines()]
    assert [adapter.method for adapter, *_ in runs] == 3 * ["bone"] + 3 * ["lora"]
    *_, training = runs[0]
    tokens = training.max_steps * training.per_device_train_batch_size * training.max_length
    assert f"at most {6 * 1.24e9 * tokens:.1e}".replace("e+", "e") in " ".join(page.split())


def test_the_citation_has_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == disha.__version__
