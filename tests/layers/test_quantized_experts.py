"""Stacks of experts in 4 bits, held against a model whose stacks have the dequantised values."""

import copy
import warnings

import peft
import pytest
import torch
from bitsandbytes.nn.parametrize import Bnb4bitParametrization, replace_parameter_4bit
from torch import nn

import disha
from disha import MergeError, TargetError
from disha.interop import lora
from tests.conftest import Made, perturb, seed_torch
from tests.four_bits import mixtral, quantize, quantize_stacks, step_bytes
from tests.functional.updates import bone_delta
from tests.reference import KINDS
from tests.whole.test_experts import IMPLEMENTATIONS, build, options_of, tokens

STACKS = ("gate_up_proj", "down_proj")


def dense(name="Mixtral", implementation="grouped_mm"):
    return build(name, implementation, width=64, inner=32)


def dequantize(model):
    """Return a dense model with the values that a quantised one computes with."""
    twin = dense()
    for name, module in twin.named_modules():
        if name.endswith("experts"):
            for stack in STACKS:
                getattr(module, stack).data.copy_(getattr(model.get_submodule(name), stack))
    return twin


def logits(model):
    return model(tokens(), use_cache=False).logits


def losses(model, steps=3):
    optimizer, found = torch.optim.AdamW(disha.adapter_parameters(model), lr=0.01), []
    for _ in range(steps):
        loss = model(tokens(), labels=tokens(), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("method", KINDS)
def test_it_trains_as_over_the_dequantized_values(method, implementation, tmp_path):
    model = quantize_stacks(dense(implementation=implementation))
    twin = dequantize(model)
    twin.set_experts_implementation(implementation)
    for one in (model, twin):
        seed_torch(0)  # a LoRA's A starts at random
        disha.inject_adapters(one, "all-linear", **options_of(method))
    assert disha.summary(model) == disha.summary(twin)  # as many parameters, and trained ones
    assert losses(model) == losses(twin)
    disha.save_adapter(model, tmp_path / "a")
    fresh = quantize_stacks(dense(implementation=implementation))
    disha.load_adapter(fresh, tmp_path / "a")
    assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize("method", KINDS)
def test_a_stack_is_read_as_often_as_without_adapters(method, monkeypatch):
    reads, read = [], Bnb4bitParametrization.forward
    monkeypatch.setattr(
        Bnb4bitParametrization, "forward", lambda self, x: reads.append(self) or read(self, x)
    )
    model = quantize_stacks(dense())
    logits(model)
    expected = list(reads)
    disha.inject_adapters(model, "all-linear", **options_of(method))
    reads.clear()
    logits(model).sum().backward()
    assert reads == expected


def test_the_file_fits_the_dense_base_and_lora_of_experts(tmp_path):
    model = quantize_stacks(dense())
    twin = dequantize(model)
    perturb(disha.inject_adapters(model, "all-linear", r=4), size=0.2)
    expected = logits(model)
    disha.save_adapter(model, tmp_path / "a")
    plain = dense()
    with warnings.catch_warnings(action="error"):  # fingerprints of a quantised base are left out
        disha.load_adapter(plain, tmp_path / "a")
    for form in ("stacked", "separate"):
        for folder, of in (("quantised", model), ("dense", plain)):
            lora.export(of, tmp_path / form / folder, experts=form)
        files = (tmp_path / form).glob("*/adapter_model.safetensors")
        assert len({file.read_bytes() for file in files}) == 1
    folder = tmp_path / "stacked" / "quantised"
    theirs = peft.PeftModel.from_pretrained(twin, folder)
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-5)
    again = quantize_stacks(dense())
    lora.load(again, folder)
    assert torch.equal(logits(again), expected)


def test_copies_removal_and_a_refused_merge():
    model = quantize_stacks(dense())
    before, expected = model.model.layers[0].mlp.experts.__class__, logits(model)
    disha.inject_adapters(model, "experts", r=4)
    disha.inject_adapters(model, "experts", r=4, method="bat", adapter="second")
    disha.set_active_adapters(model, ["default", "second"])
    perturb(model, size=0.2)
    found = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), found)
    assert disha.check_adapters(model, tokens()).ok
    for dense_merge in (False, True):
        with pytest.raises(MergeError, match="or load a base without it"):
            disha.merge_adapters(model, dense=dense_merge)
    assert torch.equal(logits(model), found)
    disha.remove_adapters(model)
    assert model.model.layers[0].mlp.experts.__class__ is before
    assert torch.equal(logits(model), expected)


def test_a_matrix_of_a_declared_layout():
    mix = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    model = Made(lambda self, x: x @ self.mix, mix=nn.Parameter(mix))
    replace_parameter_4bit(model, "mix")
    weight, x = model.mix.clone(), torch.randn(3, 64)
    with pytest.raises(TargetError, match=r"the layout of this weight \(64, 32\) is unknown"):
        disha.inject_adapters(model, "mix", 4)
    disha.inject_adapters(model, "mix", 4, layouts={"mix": "in out"}, init="kaiming")
    block = model.disha["default"]["mix"].block
    expected = x @ weight + bone_delta(x, block, 32)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_step_needs_two_fifths_of_the_memory_of_16_bits():
    assert step_bytes(quantize(mixtral())) <= 0.4 * step_bytes(mixtral())
