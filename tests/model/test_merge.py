import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import disha
from disha import ArgumentError, MergeError, ModeError
from tests import reference
from tests.conftest import (
    Doubled,
    Made,
    Tied,
    assert_unchanged,
    perturb,
    pickled,
    refused,
    snapshot,
)
from tests.reference import KINDS, METHODS, settings_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_weight_is_the_oracle_rounded_once(dtype, kind):
    model = nn.Linear(7, 6).to(dtype)
    weight = model.weight.detach().clone()
    perturb(disha.inject_adapters(model, "all-linear", 3, scale=0.7, **settings_of(kind, 2)))
    block = disha.adapter_parameters(model)[0].detach()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    delta = reference.delta_weight(kind, weight.to(wide), block.to(wide))
    expected = (weight.to(wide) + delta * 0.7).to(dtype)
    disha.merge_adapters(model)
    # one unit in the last place, of what was added up too: the order of a float32 sum may differ
    few = torch.finfo(wide).eps
    assert torch.allclose(model.weight, expected, rtol=torch.finfo(dtype).eps, atol=few)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_a_hundred_cycles_end_bit_for_bit_where_they_began(dtype, method):
    model = nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 5)).to(dtype)
    originals = [p.detach().clone() for p in model.parameters()]
    parameters = list(model.parameters())
    perturb(disha.inject_adapters(model, "all-linear", 3, method=method))
    for _ in range(100):
        disha.merge_adapters(model)
        disha.unmerge_adapters(model)
    base = [p for name, p in model.named_parameters() if "disha" not in name]
    assert all(now is then for now, then in zip(base, parameters, strict=True))
    assert all(map(torch.equal, base, originals))


@pytest.mark.parametrize("method", METHODS)
def test_merged_computes_what_unmerged_does(model, tokens, method):
    model.double()
    perturb(disha.inject_adapters(model, "all-linear", 3, method=method, dropout=0.5))
    model.eval()
    expected = model(tokens)
    disha.merge_adapters(model)
    assert torch.allclose(model(tokens), expected, rtol=0, atol=1e-12)
    model.train()  # dropout belongs to the adapter, which does not act now
    assert torch.allclose(model(tokens), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_plain_model_after_merging_in_one_call(model, tokens, method):
    model.embed.weight.requires_grad_(False)
    plain = snapshot(model)
    disha.inject_adapters(model, "all-linear", 3, method=method, adapter="a", also_train="norm")
    perturb(disha.inject_adapters(model, "head", 3, adapter="b"))
    disha.set_active_adapters(model, "a")
    expected = model(tokens)
    disha.merge_adapters(model, unload=True)
    assert torch.allclose(model(tokens), expected, atol=1e-5)
    now = snapshot(model)
    for key in ("classes", "objects", "parameters", "flags", "attributes"):
        assert now[key] == plain[key], key
    assert now["values"].keys() == plain["values"].keys()
    assert not any(isinstance(module, disha.AdaptedLayer) for module in model.modules())
    disha.inject_adapters(model, "all-linear", 3)


def test_several_adapters_each_from_the_original_weight(model, tokens):
    model.double()
    disha.inject_adapters(model, "all-linear", 2, adapter="a", method="bat")
    disha.inject_adapters(model, "proj", 3, adapter="b", method="bat")
    perturb(disha.inject_adapters(model, "head", 4, adapter="c"))
    disha.set_active_adapters(model, ["a", "b", "c"])
    expected = model(tokens)
    disha.merge_adapters(model)
    assert torch.allclose(model(tokens), expected, rtol=0, atol=1e-12)


def test_named_adapters_instead_of_the_active(model, tokens):
    model.double()
    perturb(disha.inject_adapters(model, "all-linear", 2, adapter="a"))
    expected = model(tokens)
    disha.inject_adapters(model, "head", 2, adapter="b", init="kaiming")
    disha.merge_adapters(model, "a")
    assert torch.allclose(model(tokens), expected, rtol=0, atol=1e-12)


def test_layers_without_the_merged_adapter_fall_silent(model, tokens):
    model.double()
    disha.inject_adapters(model, "q_proj", 2, adapter="a", init="kaiming")
    expected = model(tokens)
    disha.inject_adapters(model, "all-linear", 3, adapter="b", init="kaiming")
    both = model(tokens)
    disha.merge_adapters(model, "a")
    assert torch.allclose(model(tokens), expected, rtol=0, atol=1e-12)
    with pytest.raises(MergeError, match="an adapter's scale while"):
        disha.set_adapter_scale(model, 0.5, "b")
    model.load_state_dict({"head.weight": model.head.base_weight.clone()}, strict=False)
    disha.unmerge_adapters(model)
    assert torch.equal(model(tokens), both)


def test_a_base_checkpoint_is_not_lost_in_a_merged_model(model):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    disha.inject_adapters(model, "head", 2)
    disha.merge_adapters(model)
    with refused(model, MergeError, r"can't load head.weight"):
        model.load_state_dict(state)


def test_a_merge_in_inference_mode_can_be_trained_on():
    model = disha.inject_adapters(nn.Linear(6, 4), "all-linear", 2, init="kaiming")
    with torch.inference_mode():
        disha.merge_adapters(model)
    x = torch.randn(2, 6, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None


def test_autocast_does_not_coarsen_a_merge():
    model = perturb(disha.inject_adapters(nn.Linear(8, 8), "all-linear", 4, method="bat"))
    twin = copy.deepcopy(model)
    disha.merge_adapters(model)
    with torch.autocast("cpu", torch.bfloat16):
        disha.merge_adapters(twin)
    assert torch.equal(model.weight, twin.weight)


def test_unmerging_nothing_is_no_error(model):
    before = snapshot(model)
    disha.unmerge_adapters(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("clone", [copy.deepcopy, pickled])
def test_a_merged_model_can_be_copied_and_unmerged(clone):
    model = disha.inject_adapters(nn.Linear(6, 4), "all-linear", 2, init="kaiming")
    original = model.base_weight.detach().clone()
    disha.merge_adapters(model)
    twin = clone(model)
    disha.unmerge_adapters(twin)
    assert torch.equal(twin.base_weight, original)
    assert not torch.equal(model.weight, original)


def test_a_merged_model_that_changed_dtype_still_unmerges():
    model = disha.inject_adapters(nn.Linear(6, 4), "all-linear", 2, init="kaiming")
    original = model.base_weight.detach().clone()
    disha.merge_adapters(model)
    model.to(torch.bfloat16)
    disha.unmerge_adapters(model)
    assert torch.equal(model.base_weight, original.to(torch.bfloat16))


class TestTied:
    def test_merging_into_a_shared_weight_raises(self):
        model = disha.inject_adapters(Tied(), "head|q_proj", 2, exclude="embed", init="kaiming")
        with refused(model, MergeError, r"head.weight is shared with embed.weight.*untie"):
            disha.merge_adapters(model)

    def test_untie_leaves_the_embedding_and_ties_again(self, tokens):
        model = disha.inject_adapters(Tied().double(), "head", 2, exclude="embed", init="kaiming")
        expected, embedding = model(tokens), model.embed.weight.detach().clone()
        disha.merge_adapters(model, untie=True)
        assert torch.allclose(model(tokens), expected, rtol=0, atol=1e-12)
        assert torch.equal(model.embed.weight, embedding)
        disha.unmerge_adapters(model)
        assert model.head.base_weight is model.embed.weight
        assert torch.equal(model(tokens), expected)

    def test_each_side_gets_the_adapters_that_act_there(self, tokens):
        """One of two adapters leaves the head out."""
        model = disha.inject_adapters(Tied(), "embed", 2, adapter="a", exclude="head")
        perturb(disha.inject_adapters(model, "embed", 2, adapter="b"))
        disha.set_active_adapters(model, ["a", "b"])
        expected = model(tokens)
        with refused(model, MergeError, "embed.weight is shared with head.weight, where not all"):
            disha.merge_adapters(model)
        disha.merge_adapters(model, untie=True)
        torch.testing.assert_close(model(tokens), expected)
        disha.unmerge_adapters(model)
        assert torch.equal(model(tokens), expected)
        assert model.head._parameters["weight"] is model.embed._parameters["weight"]

    def test_weights_that_were_untied_under_one_block_stay_apart(self, tokens):
        model = perturb(disha.inject_adapters(Tied(), "embed|head", 2))
        model.head._parameters["weight"] = nn.Parameter(torch.randn(12, 8))
        expected = model(tokens)
        disha.merge_adapters(model)
        torch.testing.assert_close(model(tokens), expected)


def quantise(layer):
    quantize_(layer, Int8WeightOnlyConfig())


def train(layer):
    with torch.no_grad():
        layer.weight.sub_(0.1)


def change_one_value(layer):
    """One of 512, by its last digit, which no sample of values would find."""
    with torch.no_grad():
        value = layer.weight[7, 5]
        value.copy_(torch.nextafter(value.clone(), torch.tensor(9.0)))


def prune_half(layer):
    prune.l1_unstructured(layer, "weight", 0.5)


CHANGES = {
    quantise: "quantised",
    train: "changed",
    change_one_value: "changed",
    prune_half: "parametrised",
}


@pytest.mark.parametrize("change", CHANGES)
def test_unmerging_does_not_undo_a_later_change(change):
    model = perturb(disha.inject_adapters(nn.Sequential(nn.Linear(16, 32)), "0", 2))
    disha.merge_adapters(model)
    change(model[0])
    x = torch.randn(3, 16)
    expected = model(x)
    with pytest.raises(MergeError, match=f"0.weight was {CHANGES[change]} after"):
        disha.unmerge_adapters(model)
    assert torch.equal(model(x), expected)


class Squaring(nn.Linear):
    def forward(self, input):
        return torch.nn.functional.linear(input, self.weight, self.bias) ** 2


class OwnProduct(nn.Linear):
    def forward(self, input):
        return input @ self.weight.T + self.bias


class TestOwnForward:
    @pytest.mark.parametrize("cls", [Doubled, Squaring, OwnProduct])
    @pytest.mark.parametrize("method", METHODS)
    def test_merges_to_the_same_output(self, cls, method):
        model = nn.Sequential(cls(6, 4))
        disha.inject_adapters(model, "0", 2, method=method, init="kaiming")
        x = torch.randn(3, 6)
        expected = model(x)
        disha.merge_adapters(model)
        assert torch.allclose(model(x), expected, atol=1e-5)


class TestRefusals:
    def test_twice(self, model):
        disha.inject_adapters(model, "head", 2)
        disha.merge_adapters(model)
        with refused(model, MergeError, "can't merge adapters while adapters are merged"):
            disha.merge_adapters(model)

    def test_inside_adapters_disabled(self, model):
        disha.inject_adapters(model, "head", 2)
        disabled = disha.adapters_disabled(model)
        with disabled, refused(model, ModeError, "inside adapters_disabled"):
            disha.merge_adapters(model)

    def test_nothing_active(self, model):
        with pytest.raises(ArgumentError, match="nothing to merge"):
            disha.merge_adapters(model)
        disha.inject_adapters(model, "head", 2)
        disha.set_active_adapters(model, [])
        with pytest.raises(ArgumentError, match="nothing to merge"):
            disha.merge_adapters(model)

    @pytest.mark.parametrize("adapter", ["x", ["default", "x"]])
    def test_unknown(self, model, adapter):
        disha.inject_adapters(model, "head", 2)
        with refused(model, ArgumentError, "no adapter 'x'"):
            disha.merge_adapters(model, adapter)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
    def test_values_that_are_not_finite(self, model, value):
        perturb(disha.inject_adapters(model, "all-linear", 2))
        model.head.disha["default"].block.data.fill_(value)
        disha.set_adapter_scale(model, 10.0)
        with refused(model, MergeError, r"head.weight gives values that are not finite"):
            disha.merge_adapters(model)

    def test_parametrised_weight(self):
        model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)))
        disha.inject_adapters(model, "all-linear", 2, init="kaiming")
        with refused(model, MergeError, "remove it and the parametrization"):
            disha.merge_adapters(model)


def test_a_model_that_was_made_in_inference_mode():
    with torch.inference_mode():
        x, model = torch.randn(3, 6), nn.Sequential(nn.Linear(6, 4))
        base = model(x)
        perturb(disha.inject_adapters(model, "0", 2))
        expected = model(x)
        disha.merge_adapters(model)
        torch.testing.assert_close(model(x), expected)
        disha.unmerge_adapters(model)
        disha.remove_adapters(model)
        assert torch.equal(model(x), base)


def test_a_second_name_in_the_same_module_is_not_merged_in_silence():
    weight, x = nn.Parameter(torch.randn(4, 4)), torch.randn(3, 4)
    model = Made(lambda self, x: x @ self.a.mT + x @ self.b.mT, a=weight, b=weight)
    plain = copy.deepcopy(model)
    perturb(disha.inject_adapters(model, "a", 2, exclude="b", layouts={"a": "out in"}))
    before = model(x)
    with pytest.raises(MergeError, match="a is shared with b"):
        disha.merge_adapters(model)
    assert torch.equal(model(x), before)
    disha.inject_adapters(plain, "a", 2, layouts={"a": "out in"})  # both names read one update
    perturb(plain)
    before = plain(x)
    disha.merge_adapters(plain)
    assert torch.allclose(plain(x), before, atol=1e-5)
    assert plain.a is plain.b
