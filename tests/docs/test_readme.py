"""What the README claims: its figures are those of the kept results, its links lead somewhere."""

import copy
import functools
import json
import re

import bitsandbytes
import datasets
import peft
import pytest
import tokenizers
import torch
import torchvision
import transformers
import trl

import disha
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


def test_its_first_screens_have_what_it_is_why_not_peft_what_to_type_and_the_limits():
    lines = TEXT.splitlines()
    for what in ("```python", "```text", "disha finetune --base", "**Why not PEFT?**", "No GPU",
                 "make demo", "make test", "tutorial.md", "custom-model.md"):  # fmt: skip
        assert what in "\n".join(lines[:53])
    for what in ("```diff", "## If you use PEFT", "## What to know", "## Install"):
        assert what in "\n".join(lines[:180])
    pictures = [link for link in links_of(TEXT) if link.endswith((".svg", ".png"))]
    assert pictures == ["docs/assets/compared.png"]


@pytest.fixture
def tiny_model_and_rows():
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    rows = [{"input_ids": list(range(8)), "attention_mask": [1] * 8}] * 8
    return transformers.LlamaForCausalLM(config), datasets.Dataset.from_list(rows)


@pytest.mark.parametrize("side", ["-", "+"])
@pytest.mark.parametrize("name", ["README.md", "docs/migrating.md"])
def test_both_sides_of_the_ten_lines_of_a_peft_user_run(
    name, side, tiny_model_and_rows, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / name).read_text(encoding="utf-8")
    diff = re.search(r"^```diff\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[1].splitlines()
    code = "\n".join(line[1:] for line in diff if line[:1] in (side, " "))
    assert len(code.splitlines()) <= 10
    model, rows = tiny_model_and_rows
    short = functools.partial(trl.SFTConfig, max_steps=1, report_to=[], use_cpu=True, bf16=False)
    tokenizer = trainer_tokenizer()
    code = code.replace("trl import SFTConfig, SFTTrainer", "trl import SFTTrainer")
    code = code.replace("train_dataset=rows", "train_dataset=rows, processing_class=tokenizer")
    exec(code, {"model": model, "rows": rows, "SFTConfig": short, "tokenizer": tokenizer})
    assert list((tmp_path / "output").glob("adapter*.safetensors"))


def trainer_tokenizer():
    words = {f"w{number}": number for number in range(32)}
    tokens = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="w0", eos_token="w1", unk_token="w0"
    )


@pytest.mark.parametrize("text", [TEXT, INDEX])
def test_both_first_pages_warn_of_the_other_package_and_say_what_was_not_run(text):
    words = " ".join(text.split())
    assert "The package `disha` is another project" in words
    assert ("No GPU has run this yet" in words) == ("No GPU has run this yet" in WORDS)
    assert "independent implementation" in words


def test_it_says_where_to_get_the_code_once_there_is_an_address():
    assert f"git clone {ADDRESS or 'ADDRESS'} disha" in TEXT


def test_every_link_leads_somewhere():
    links = {link.partition("#")[0] for link in links_of(TEXT) if "://" not in link} - {""}
    assert len(links) > 20
    assert [link for link in sorted(links) if not (ROOT / link).exists()] == []


def tagger():
    code = next(block.code for block in blocks_of(TEXT) if "class Tagger" in block.code)
    scope = {}
    exec(code.partition("\nmodel, x")[0], scope)
    return scope


def test_peft_trains_the_gru_of_the_example_by_name_and_refuses_the_parameter_of_the_model():
    scope = tagger()
    weights = ["gru.weight_ih_l0", "gru.weight_hh_l0"]
    assert json.dumps(weights) in WORDS
    config = peft.LoraConfig(r=4, target_modules=["head"], target_parameters=weights)
    theirs = peft.get_peft_model(scope["Tagger"](), config)
    theirs(torch.randn(2, 3, 4)).square().sum().backward()
    factors = {name: one for name, one in theirs.named_parameters() if "lora_B" in name}
    assert len(factors) == 3
    assert all(one.grad.any() for one in factors.values())
    for config in (
        peft.LoraConfig(target_modules=["gru", "head"]),
        peft.MissConfig(target_modules=["gru", "head"]),
        peft.LoraConfig(target_parameters=["mix"]),
        peft.LoraConfig(target_parameters=[*weights, "mix"]),
    ):
        with pytest.raises((ValueError, TypeError), match="is not supported"):
            peft.get_peft_model(scope["Tagger"](), config)


def test_peft_has_no_effect_where_a_weight_is_read_and_its_layer_not_called():
    class Reader(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.project = torch.nn.Linear(8, 8)

        def forward(self, x):
            return x @ self.project.weight.T

    for config in (
        peft.LoraConfig(target_modules=["project"], init_lora_weights=False),
        peft.LoraConfig(target_parameters=["project.weight"], init_lora_weights=False),
        peft.MissConfig(r=4, target_modules=["project"], init_weights=False),
    ):
        base, x = Reader(), torch.randn(2, 8)
        before = base(x)
        assert torch.equal(peft.get_peft_model(base, config)(x), before)


def test_peft_changes_nothing_in_the_qkv_of_swin():
    assert "On `qkv` of torchvision's Swin, PEFT's LoRA changes nothing" in WORDS
    swin, images = torchvision.models.swin_t().eval(), torch.randn(1, 3, 64, 64)
    config = peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False)
    with torch.no_grad():
        before = swin(images)
        assert torch.equal(peft.get_peft_model(copy.deepcopy(swin), config)(images), before)
        disha.inject_adapters(swin, "qkv", r=16, init="kaiming")
        assert not torch.equal(swin(images), before)


@pytest.mark.parametrize(
    "options", [{"init_weights": False}, {"init_weights": "mini", "mini_r": 4}]
)
def test_peft_saves_its_miss_as_a_lora(options, tmp_path):
    assert cells("runs elsewhere")[2] == "as LoRA, by `save_as_lora` of PEFT 0.21; merged"
    base, x = torch.nn.Sequential(torch.nn.Linear(32, 8)), torch.randn(3, 32)
    config = peft.MissConfig(r=8, target_modules=["0"], **options)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    torch.nn.init.normal_(theirs.base_model.model[0].miss_block["default"])
    peft.save_as_lora(tmp_path, theirs, rank=8)
    lora = peft.PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(lora(x), theirs(x))


def test_peft_trains_miss_over_4_bits():
    assert cells("adapts")[2] == "linear, also quantised"
    base = torch.nn.Sequential(bitsandbytes.nn.Linear4bit(64, 8)).to("cpu")
    theirs = peft.get_peft_model(base, peft.MissConfig(r=8, target_modules=["0"]))
    theirs(torch.randn(2, 64)).square().sum().backward()
    assert theirs.base_model.model[0].miss_block["default"].grad.any()


def test_peft_un_merges_by_subtracting_and_disha_restores_every_bit():
    scope = tagger()
    model = scope["Tagger"]()
    theirs = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["head"], init_lora_weights=False)
    )
    before = theirs.base_model.model.head.weight.detach().clone()
    for _ in range(20):
        theirs.merge_adapter()
        theirs.unmerge_adapter()
    assert not torch.equal(theirs.base_model.model.head.weight, before)
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
    shown = tables_of((ROOT / "docs/performance.md").read_text(encoding="utf-8"))[0]
    rows = {what: [figure.split()[0] for figure in figures] for what, *figures in shown}
    ours, _, theirs = (cell.split(" / ") for cell in cells("a training step of SmolLM2-135M"))
    for place, dtype in enumerate(("float32", "bfloat16")):
        told = rows[f"One training step: SmolLM2-135M, {dtype}"]
        assert (told[0], told[-1]) == (ours[place], theirs[place])
    kept = rows["Memory: activations kept by 4 layers"]
    assert [kept[0], kept[-1]] == [cells("activations kept")[0], cells("activations kept")[2]]
