"""Owners that read a layer's weight instead of calling it: found in their source, and adapted."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import disha
from disha import ArgumentError, MergeError, ModeError, TargetError
from disha.layers.fronts import ReadLayer
from disha.layers.readers import weight_reads
from tests import reference
from tests.conftest import assert_unchanged, needs_fully_shard, perturb, snapshot


class Reader(nn.Module):
    """Hands the weight of one layer to a function, and calls the other."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 8)
        self.proj = nn.Linear(8, 4)

    def forward(self, x):
        return self.proj(self.project(x))

    def project(self, x):
        return F.linear(x, self.qkv.weight, self.qkv.bias)


class Below(nn.Module):
    """Reads the weight of a grandchild, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"layer": nn.Linear(6, 8, bias=False)})
        self.body = Reader()

    def forward(self, x):
        return x @ self.body.qkv.weight.T


class Both(nn.Module):
    """Calls a convolution on long inputs, and reads its weight for one position."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 3, 2, bias=False)

    def forward(self, x):
        if x.shape[-1] > self.conv.weight.shape[-1]:
            return self.conv(x)
        return torch.einsum("nik,oik->no", x, self.conv.weight).unsqueeze(-1)


class TiedByFunction(nn.Module):
    """Uses the table of its embedding as the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)

    def forward(self, tokens):
        return F.linear(self.embed(tokens), self.embed.weight)


class Asks(nn.Module):
    """Asks for facts about a weight, and reads it where forward does not get to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        nn.init.zeros_(self.layer.weight)

    def forward(self, x):
        if isinstance(self.layer.weight, nn.Parameter) and self.layer.weight is not None:
            x = x.to(self.layer.weight.dtype).view(-1, self.layer.weight.size(1))
        return self.layer(x)

    def reset(self):
        nn.init.ones_(self.layer.weight)


class AsksMore(nn.Module):
    """Asks for facts in the ways that need more than a look at what follows `weight`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        x = x.to(self.layer.weight).type_as(self.layer.weight)
        return self.layer(x) + self.layer.weight.new_zeros(4)


class Above(Reader):
    """Leaves reading to the class that it derives from."""

    def forward(self, x):
        return super().forward(x) + 1


class Listed(nn.Module):
    """Reads the weights of a list, by a number."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x, /):
        for i in range(len(self.layers)):
            x = F.linear(x, self.layers[i].weight)
        return x


class Typed(nn.Module):
    pass


class TestFinding:
    @pytest.mark.parametrize(
        ("cls", "found"),
        [
            (Reader, {("qkv", "weight"), ("qkv", "bias")}),
            (type("Sub", (Reader,), {}), {("qkv", "weight"), ("qkv", "bias")}),
            (Below, {("body.qkv", "weight")}),
            (Both, {("conv", "weight")}),
            (TiedByFunction, {("embed", "weight")}),
            (Asks, set()),
            (AsksMore, set()),
            (Above, {("qkv", "weight"), ("qkv", "bias")}),
            (Listed, {("layers.[]", "weight")}),
            (Typed, set()),
            (nn.Linear, set()),
            (nn.TransformerEncoderLayer, set()),
        ],
    )
    def test_what_is_read(self, cls, found):
        weights = {pair for pair in weight_reads(cls) if pair[1] in ("weight", "bias")}
        assert weights == found

    def test_an_overridden_method_counts(self):
        class Calls(Reader):
            def project(self, x):
                return self.qkv(x)

        assert weight_reads(Calls) == frozenset()

    def test_any_of_a_list(self):
        model, x = Listed().double(), torch.randn(3, 6, dtype=torch.float64)
        disha.inject_adapters(model, "all-linear", 2)
        perturb(model)
        output = model(x)
        assert not torch.allclose(output, Listed().double()(x))
        disha.merge_adapters(model)
        assert torch.allclose(model(x), output, rtol=0, atol=1e-10)

    def test_a_class_without_source_is_left_alone(self):
        scope: dict[str, object] = {"nn": nn}
        exec("class Made(nn.Module):\n    def forward(self, x): return self.a.weight @ x", scope)
        assert weight_reads(scope["Made"]) == frozenset()

    def test_models_that_people_have(self):
        swin = pytest.importorskip("torchvision.models.swin_transformer")
        for cls in (swin.ShiftedWindowAttention, swin.ShiftedWindowAttentionV2):
            assert {("qkv", "weight"), ("proj", "weight")} <= weight_reads(cls)


CASES = {
    "linear": (Reader, "qkv", torch.randn(3, 6)),
    "below": (Below, "qkv", torch.randn(3, 6)),
    "called": (Both, "conv", torch.randn(3, 4, 5)),
    "read": (Both, "conv", torch.randn(3, 4, 2)),
    "tied by a function": (TiedByFunction, "embed", torch.tensor([[1, 6], [0, 3]])),
}


def build(name, dtype=torch.float64):
    torch.manual_seed(0)
    cls, target, x = CASES[name]
    return cls().to(dtype), target, x.to(dtype) if x.is_floating_point() else x


def delta_of(layer):
    block = layer.disha["default"].block.detach()
    weight = layer.base_weight.detach()
    if isinstance(layer, nn.Conv1d):
        return reference.conv_delta_weight(block, layer.in_channels, layer.out_channels)
    if isinstance(layer, nn.Embedding):
        return reference.embedding_delta_weight(block, *weight.shape)
    return reference.delta_weight(weight, block)


def with_update(plain, model, target, scale=1.0):
    """Add the update, by the oracle, to the weight of the plain model."""
    layers = [m for m in model.modules() if isinstance(m, ReadLayer)]
    assert len(layers) == 1
    name = next(name for name, module in model.named_modules() if module is layers[0])
    with torch.no_grad():
        plain.get_submodule(name).weight.add_(delta_of(layers[0]) * scale)
    return plain


@pytest.mark.parametrize("name", CASES)
class TestActing:
    def test_injection_is_the_identity(self, name):
        model, target, x = build(name)
        expected = model(x)
        assert torch.equal(disha.inject_adapters(model, target, 2)(x), expected)

    def test_the_reader_gets_the_merged_weight(self, name):
        model, target, x = build(name)
        disha.inject_adapters(model, target, 2, scale=0.5)
        perturb(model)
        plain = with_update(build(name)[0], model, target, 0.5)
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with context():
                assert torch.allclose(model(x), plain(x), rtol=0, atol=1e-10)
                assert not torch.allclose(model(x), build(name)[0](x))

    def test_the_block_gets_its_gradient(self, name):
        model, target, x = build(name)
        disha.inject_adapters(model, target, 2)
        perturb(model)
        (block,) = disha.adapter_parameters(model)
        assert torch.autograd.gradcheck(
            lambda b: torch.func.functional_call(model, {key_of(model): b}, (x,)),
            block.detach().clone().requires_grad_(),
        )

    def test_merged_is_unmerged_and_comes_back_bit_for_bit(self, name):
        model, target, x = build(name)
        disha.inject_adapters(model, target, 2)
        perturb(model)
        before = snapshot(model)
        expected = model(x)
        for _ in range(5):
            disha.merge_adapters(model)
            merged = model(x)
            disha.unmerge_adapters(model)
        assert torch.allclose(merged, expected, rtol=0, atol=1e-10)
        assert_unchanged(model, before)

    def test_disabled_scaled_and_several(self, name):
        model, target, x = build(name)
        base = model(x)
        disha.inject_adapters(model, target, 2, adapter="a", init="kaiming")
        disha.inject_adapters(model, target, 1, adapter="b", init="kaiming")
        disha.set_active_adapters(model, ["a", "b"])
        layer = next(m for m in model.modules() if isinstance(m, ReadLayer))
        both = layer.base_weight + sum(layer.delta_weight(layer.disha[n]) for n in ("a", "b"))
        assert torch.allclose(layer.weight, both)
        with disha.adapters_disabled(model):
            assert torch.equal(model(x), base)
        for adapter in ("a", "b"):
            disha.set_adapter_scale(model, 0.0, adapter)
        assert torch.equal(model(x), base)

    def test_file_round_trip(self, name, tmp_path):
        model, target, x = build(name)
        disha.inject_adapters(model, target, 2)
        perturb(model)
        disha.save_adapter(model, tmp_path / "a")
        fresh = build(name)[0]
        disha.load_adapter(fresh, tmp_path / "a")
        assert torch.equal(fresh(x), model(x))

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies(self, name, clone):
        model, target, x = build(name)
        disha.inject_adapters(model, target, 2)
        perturb(model)
        assert torch.equal(clone(model)(x), model(x))

    def test_removal_restores(self, name):
        model, target, _ = build(name)
        before = snapshot(model)
        disha.inject_adapters(model, target, 2)
        disha.remove_adapters(model)
        assert_unchanged(model, before)

    def test_keys_and_parameters_stay(self, name):
        model, target, _ = build(name)
        keys, parameters = set(model.state_dict()), dict(model.named_parameters())
        disha.inject_adapters(model, target, 2)
        assert keys < set(model.state_dict())
        assert all(dict(model.named_parameters())[key] is p for key, p in parameters.items())
        model.load_state_dict(build(name)[0].state_dict())

    def test_compiled_is_eager(self, name):
        model, target, x = build(name)
        disha.inject_adapters(model, target, 2)
        perturb(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(x), model(x), rtol=0, atol=1e-10)


def key_of(model):
    return next(key for key in model.state_dict() if key.endswith("bone_block"))


class TestRefusals:
    def test_routing_through_a_weight_that_is_read(self):
        model, target, x = build("linear")
        disha.inject_adapters(model, target, 2)
        with (
            disha.route_adapters(model, ["default", None, None]),
            pytest.raises(ModeError, match="reads its weight, one for the whole batch"),
        ):
            model(x)
        with disha.adapters_disabled(model), disha.route_adapters(model, ["default", None, None]):
            model(x)

    def test_dropout_that_could_not_act(self, tmp_path):
        model, target, _ = build("linear")
        before = snapshot(model)
        with pytest.raises(TargetError, match=r"qkv: the module around it.*use dropout=0"):
            disha.inject_adapters(model, target, 2, dropout=0.1)
        assert_unchanged(model, before)
        disha.inject_adapters(model, "proj", 2, dropout=0.1)

    def test_a_weight_computed_from_others(self):
        model, target, _ = build("linear")
        torch.nn.utils.parametrizations.weight_norm(model.qkv)
        before = snapshot(model)
        with pytest.raises(TargetError, match="computed from other parameters"):
            disha.inject_adapters(model, target, 2)
        assert_unchanged(model, before)

    def test_a_layer_that_was_adapted_by_itself(self):
        model, _, _ = build("linear")
        disha.inject_adapters(model.qkv, "all-linear", 2, adapter="a")
        with pytest.raises(TargetError, match="adapted on its own before"):
            disha.inject_adapters(model, "qkv", 2, adapter="b")

    def test_merging_what_is_not_finite(self):
        model, target, _ = build("linear")
        disha.inject_adapters(model, target, 2)
        with torch.no_grad():
            next(disha.adapter_parameters(model)).fill_(torch.inf)
        before = snapshot(model)
        with pytest.raises(MergeError, match="not finite"):
            disha.merge_adapters(model)
        assert_unchanged(model, before)

    def test_r_that_does_not_fit(self):
        model, target, _ = build("linear")
        with pytest.raises(ArgumentError, match="r=7 is larger"):
            disha.inject_adapters(model, target, 7)


def test_bat_through_a_weight_that_is_read():
    model, target, x = build("linear")
    disha.inject_adapters(model, target, 2, method="bat")
    perturb(model)
    plain = with_update(build("linear")[0], model, target)
    assert torch.allclose(model(x), plain(x), rtol=0, atol=1e-10)


def test_all_linear_leaves_a_head_out_that_is_tied_to_a_table_which_is_read():
    model = nn.ModuleDict({"body": TiedByFunction(), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["body"].embed.weight
    model["last"] = nn.Linear(7, 7)
    disha.inject_adapters(model, "embed", 2, adapter="a", init="kaiming")
    plan = disha.plan_adapters(model, "all-linear", 2, adapter="b")
    assert [layer.name for layer in plan.layers] == ["last"]


def test_resetting_a_layer_that_is_read_resets_its_own_weight():
    model, target, _ = build("linear")
    disha.inject_adapters(model, target, 2)
    perturb(model)
    before = model.qkv.base_weight.clone()
    model.qkv.reset_parameters()
    assert not torch.equal(model.qkv.base_weight, before)
    assert torch.equal(model.qkv.weight, model.qkv.base_weight)  # the block starts again, at zero
    assert model.qkv.disha.active == ("default",)


def test_a_parametrization_of_a_layer_that_is_read_is_refused():
    model, target, x = build("linear")
    disha.inject_adapters(model, target, 2)
    perturb(model)
    before, expected = snapshot(model), model(x)
    with pytest.raises(ArgumentError, match="remove the adapters first"):
        torch.nn.utils.parametrizations.weight_norm(model.qkv)
    assert_unchanged(model, before)
    assert torch.equal(model(x), expected)


@pytest.fixture
def process_group():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@needs_fully_shard
@pytest.mark.usefixtures("process_group")
def test_fsdp_keeps_the_original_of_a_weight_that_is_read():
    from torch.distributed.fsdp import fully_shard

    model, target, x = build("linear")
    disha.inject_adapters(model, target, 2)
    perturb(model)
    original, expected = model.qkv.base_weight.clone(), model(x)
    fully_shard(model)
    for _ in range(2):
        output = model(x)
        assert torch.equal(output, expected)
        output.sum().backward()
    assert torch.equal(model.qkv.base_weight.full_tensor(), original)


def test_an_error_within_the_update_is_not_taken_for_a_missing_weight():
    model, target, x = build("linear")
    disha.inject_adapters(model, target, 2)
    perturb(model)
    model.qkv.delta_weight = lambda block: block.no_such_attribute
    with pytest.raises(RuntimeError, match="the update of the weight failed"):
        model(x)
