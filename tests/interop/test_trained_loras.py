"""Any LoRA that PEFT has trained acts, trains on, merges and goes back."""

import copy
from functools import partial

import peft
import pytest
import torch
from torch import nn

import disha
from disha.cli import main
from disha.errors import ConversionError
from disha.interop import lora
from tests.conftest import assert_same
from tests.language_models import gpt2, llama, mixtral
from tests.lora_folders import TOKENS, Vision, adapted, check_served, output
from tests.peft_models import tensors_of

ATTENTION = ["q_proj", "v_proj"]


def config(**options):
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ATTENTION, **options})


KINDS = {
    "plain": (llama, config()),
    "root": (llama, config(use_rslora=True)),
    "patterns": (
        llama,
        config(rank_pattern={"v.*roj": 5, ".*0.*(q|k)_proj": 4}, alpha_pattern={"0.*q_proj": 2}),
    ),
    "embedding": (llama, config(target_modules=["embed_tokens", "q_proj"])),
    "whole modules": (llama, config(modules_to_save=["norm"])),
    "tokens": (llama, config(trainable_token_indices=[3, 5])),
    "tied tokens": (
        partial(llama, tie_word_embeddings=True),
        config(trainable_token_indices=[3, 5]),
    ),
    "Conv1D": (gpt2, config(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "convolutions": (Vision, config(target_modules=["plane", "line", "space", "point"])),
    "experts": (
        mixtral,
        config(target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"]),
    ),
}


def inputs_of(base):
    return torch.randn(2, 5, 7, 6) if isinstance(base, Vision) else TOKENS


def made(kind, folder, change):
    """Return a base, a model of PEFT with a LoRA that has changed so much, and its folder."""
    make, settings = KINDS[kind]
    torch.manual_seed(0)
    base = make().eval()
    theirs = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(settings)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=change)
    theirs.save_pretrained(str(folder), save_embedding_layers=False)
    return base, theirs, folder


@pytest.fixture(params=KINDS)
def trained(request, tmp_path):
    return made(request.param, tmp_path / "theirs", change=0.1)


def losses_of(model, inputs, parameters):
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = output(model, inputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_it_acts_goes_back_and_merges(trained, tmp_path):
    base, _, folder = trained
    inputs = inputs_of(base)
    ours = copy.deepcopy(base)
    disha.load_adapter(ours, folder)
    assert {layer.method for layer in disha.summary(ours).layers} <= {"lora", "rows"}
    check_served(base, folder, ours, inputs, 1e-5)
    lora.export(ours, tmp_path / "ours")
    assert_same(tensors_of(tmp_path / "ours"), tensors_of(folder))
    check_served(base, tmp_path / "ours", ours, inputs, 1e-5)


@pytest.mark.parametrize("change", [0.0, 0.1], ids=["from its start", "from the middle"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_on(kind, change, tmp_path):
    base, theirs, folder = made(kind, tmp_path, change)
    inputs = inputs_of(base)
    ours = copy.deepcopy(base)
    lora.load(ours, folder)
    expected = losses_of(theirs, inputs, [p for p in theirs.parameters() if p.requires_grad])
    found = losses_of(ours, inputs, [p for p in ours.parameters() if p.requires_grad])
    assert found[-1] < found[0]
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("trained", sorted({*KINDS} - {"convolutions"}), indirect=True)
def test_it_is_inspected_and_merged(trained, tmp_path):
    base, theirs, folder = trained
    base.save_pretrained(tmp_path / "base")
    weights = folder / "adapter_model.safetensors"  # names the folder too
    assert main(["inspect", str(weights), "--base", str(tmp_path / "base")]) == 0
    assert main(["merge", str(tmp_path / "base"), str(folder), str(tmp_path / "merged")]) == 0
    merged = type(base).from_pretrained(tmp_path / "merged").eval()
    expected = output(theirs, TOKENS)
    torch.testing.assert_close(output(merged, TOKENS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trained", sorted({*KINDS} - {"tied tokens"}), indirect=True)
def test_it_becomes_an_adapter_file(trained, tmp_path):
    base, theirs, folder = trained
    words = ["convert", str(folder), str(tmp_path / "file"), "--to", "disha"]
    if not isinstance(base, Vision):
        base.save_pretrained(tmp_path / "base")
        words += ["--base", str(tmp_path / "base")]
    assert main(words) == 0
    disha.load_adapter(base, tmp_path / "file")
    inputs = inputs_of(base)
    expected = output(theirs, inputs)
    torch.testing.assert_close(output(base, inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 3, "all"])
def test_what_groups_exported_comes_back_as_groups(tmp_path, groups):
    base = Vision().eval()
    base.linear = nn.Linear(10, 9)
    ours = adapted(base, "all-linear", 2, groups=groups)
    lora.export(ours, tmp_path)
    again = copy.deepcopy(base)
    lora.load(again, tmp_path)
    sizes = [sum(p.numel() for p in disha.adapter_parameters(one)) for one in (again, ours)]
    assert sizes[0] <= sizes[1]
    for name, layer in ours.named_modules():
        if isinstance(layer, disha.AdaptedLayer):
            found = again.get_submodule(name)
            delta = found.delta_weight(found.disha["default"])
            assert torch.equal(delta, layer.delta_weight(layer.disha["default"]))


@pytest.mark.parametrize("options", [{"bias": "lora_only"}, {"use_dora": True}])
def test_what_is_more_than_a_lora_is_refused(tmp_path, options):
    theirs = peft.get_peft_model(llama(), config(**options))
    theirs.save_pretrained(str(tmp_path))
    with pytest.raises(ConversionError, match=f"uses {next(iter(options))}"):
        lora.load(llama(), tmp_path)
