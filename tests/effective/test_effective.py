"""The effective weight: whoever reads an adapted weight sees the update."""

import copy
import inspect
import itertools
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import disha
from disha import ArgumentError, ModeError
from disha.layers.adapted import AdaptedLayer
from tests import reference
from tests.conftest import (
    Made,
    assert_unchanged,
    freshly_compiled,
    merged_weight,
    needs_fully_shard,
    perturb,
    pickled,
    snapshot,
)


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


class Both(nn.Module):
    """Calls a convolution on long inputs, and reads its weight for one position."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 3, 2, bias=False)

    def forward(self, x):
        if x.shape[-1] > self.conv.weight.shape[-1]:
            return self.conv(x)
        return torch.einsum("nik,oik->no", x, self.conv.weight).unsqueeze(-1)


class Listed(nn.Module):
    """Reads the weights of a list, by a number."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x, /):
        for i in range(len(self.layers)):
            x = F.linear(x, self.layers[i].weight)
        return x


class Looped(nn.Module):
    """Puts the layers of a list into a variable, and reads their weights in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6)])

    def forward(self, x):
        for layer in self.layers:
            weight = layer.weight
            x = torch.einsum("ni,oi->no", x, weight) + x @ weight.mT
        return x


class Standardised(nn.Conv1d):
    """Computes its convolution with a standardised weight."""

    def forward(self, x):
        weight = self.weight
        mean = weight.mean(dim=(1, 2), keepdim=True)
        spread = weight.std(dim=(1, 2), keepdim=True)
        return F.conv1d(x, (weight - mean) / (spread + 1e-5), self.bias)


def below():
    """Reads the weight of a grandchild, transposed."""
    inner = nn.ModuleDict({"layer": nn.Linear(6, 8, bias=False)})
    return Made(lambda self, x: x @ self.body.qkv.weight.T, inner=inner, body=Reader())


def tied_by_function():
    """Uses the table of its embedding as the head."""
    embed = nn.Embedding(7, 4)
    return Made(lambda self, tokens: F.linear(self.embed(tokens), self.embed.weight), embed=embed)


def held():
    return Made(lambda self, x: self.conv(x), conv=Standardised(4, 3, 2))


class ByKeywords(nn.Module):
    """Calls the product with arguments by name, W first, and in place of a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        weight = self.layer.weight
        y = F.linear(input=x, weight=weight, bias=self.layer.bias)
        y = y + torch.matmul(weight, x.mT).mT + (weight @ x[0])
        return y + torch.addmm(input=self.layer.bias, mat1=x, mat2=weight.t())


CASES = {
    "linear": (Reader, "qkv", torch.randn(3, 6)),
    "in a list": (Listed, "layers.1", torch.randn(3, 6)),
    "in a loop": (Looped, "layers", torch.randn(3, 6)),
    "standardised": (held, "conv", torch.randn(3, 4, 5)),
    "by keywords": (ByKeywords, "layer", torch.randn(3, 6)),
    "below": (below, "qkv", torch.randn(3, 6)),
    "called": (Both, "conv", torch.randn(3, 4, 5)),
    "read": (Both, "conv", torch.randn(3, 4, 2)),
    "tied by a function": (tied_by_function, "embed", torch.tensor([[1, 6], [0, 3]])),
}


def build(name, dtype=torch.float64):
    torch.manual_seed(0)
    cls, target, x = CASES[name]
    return cls().to(dtype), target, x.to(dtype) if x.is_floating_point() else x


def delta_of(layer):
    block = layer.disha["default"]
    weight = layer.base_weight.detach()
    pattern = block.slot.layout.pattern
    return reference.layout_delta_weight(block.method.name, pattern, block.block.detach(), weight)


def with_update(plain, model, target, scale=1.0):
    """Add the update, by the oracle, to the weight of the plain model."""
    layers = [m for m in model.modules() if isinstance(m, AdaptedLayer)]
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
        perturb(disha.inject_adapters(model, target, 2, scale=0.5))
        plain = with_update(build(name)[0], model, target, 0.5)
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with context():
                assert torch.allclose(model(x), plain(x), rtol=0, atol=1e-10)
                assert not torch.allclose(model(x), build(name)[0](x))

    def test_the_block_gets_its_gradient(self, name):
        model, target, x = build(name)
        perturb(disha.inject_adapters(model, target, 2))
        (block,) = disha.adapter_parameters(model)
        assert torch.autograd.gradcheck(
            lambda b: torch.func.functional_call(model, {key_of(model): b}, (x,)),
            block.detach().clone().requires_grad_(),
        )

    def test_merged_is_unmerged_and_comes_back_bit_for_bit(self, name):
        model, target, x = build(name)
        perturb(disha.inject_adapters(model, target, 2))
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
        layer = next(m for m in model.modules() if isinstance(m, AdaptedLayer))
        both = layer.base_weight + sum(layer.delta_weight(layer.disha[n]) for n in ("a", "b"))
        assert torch.allclose(layer.weight + 0, both)
        with disha.adapters_disabled(model):
            assert torch.equal(model(x), base)
        for adapter in ("a", "b"):
            disha.set_adapter_scale(model, 0.0, adapter)
        assert torch.equal(model(x), base)

    def test_compiled_is_eager(self, name):
        model, target, x = build(name)
        perturb(disha.inject_adapters(model, target, 2))
        compiled = freshly_compiled(model)
        assert torch.allclose(compiled(x), model(x), rtol=0, atol=1e-10)


def key_of(model):
    return next(key for key in model.state_dict() if key.endswith("bone_block"))


class TestRefusals:
    def test_routing_through_an_operation_that_needs_one_weight(self):
        model, target, x = build("in a loop")
        disha.inject_adapters(model, target, 2)
        with (
            disha.route_adapters(model, ["default", None, None]),
            pytest.raises(ModeError, match=r"can't be routed here.*one computed weight"),
        ):
            model(x)
        with disha.adapters_disabled(model), disha.route_adapters(model, ["default", None, None]):
            model(x)
        layer = disha.inject_adapters(nn.Linear(4, 4), "", 2)
        with (
            disha.route_adapters(layer, ["default"]),
            pytest.raises(ModeError, match="one computed"),
        ):
            layer.weight @ x.new_ones(4, 2)

    def test_dropout_that_can_not_act(self):
        model, target, x = build("standardised")
        disha.inject_adapters(model, target, 2, dropout=0.1)
        with pytest.raises(ModeError, match=r"dropout can't act here.*dropout=0"):
            model(x)
        model.eval()(x)


def test_bat_through_a_weight_that_is_read():
    model, target, x = build("linear")
    perturb(disha.inject_adapters(model, target, 2, method="bat"))
    plain = with_update(build("linear")[0], model, target)
    assert torch.allclose(model(x), plain(x), rtol=0, atol=1e-10)


def test_all_linear_leaves_a_head_out_that_is_tied_to_a_table_which_is_read():
    model = nn.ModuleDict({"body": tied_by_function(), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["body"].embed.weight
    model["last"] = nn.Linear(7, 7)
    disha.inject_adapters(model, "embed", 2, adapter="a", init="kaiming")
    plan = disha.plan_adapters(model, "all-linear", 2, adapter="b")
    assert [layer.name for layer in plan.layers] == ["last"]


def test_resetting_a_layer_that_is_read_resets_its_own_weight():
    model, target, _ = build("linear")
    perturb(disha.inject_adapters(model, target, 2))
    before = model.qkv.base_weight.clone()
    model.qkv.reset_parameters()
    assert not torch.equal(model.qkv.base_weight, before)
    assert torch.equal(model.qkv.weight, model.qkv.base_weight)  # the block starts again, at zero
    assert model.qkv.disha.active == ("default",)


@needs_fully_shard
@pytest.mark.usefixtures("process_group")
def test_fsdp_keeps_the_original_of_a_weight_that_is_read():
    from torch.distributed.fsdp import fully_shard

    model, target, x = build("linear")
    perturb(disha.inject_adapters(model, target, 2))
    original, expected = model.qkv.base_weight.clone(), model(x)
    fully_shard(model)
    for _ in range(2):
        output = model(x)
        assert torch.equal(output, expected)
        output.sum().backward()
    assert torch.equal(model.qkv.base_weight.full_tensor(), original)


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("keeps", [True, False])
def test_a_flat_parameter_acts_if_the_parameters_stay(keeps):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model, target, x = build("linear")
    perturb(disha.inject_adapters(model, target, 2))
    expected = model(x)
    [gradient] = torch.autograd.grad(expected.sum(), list(disha.adapter_parameters(model)))
    device = torch.device("cpu")
    wrapped = FullyShardedDataParallel(
        model.requires_grad_(), device_id=device, use_orig_params=keeps
    )
    if not keeps:
        with pytest.raises(ModeError, match="use_orig_params=True"):
            wrapped(x)
        return
    output = wrapped(x)
    output.sum().backward()
    [found] = [one.grad for name, one in wrapped.named_parameters() if "block" in name]
    assert torch.equal(output, expected)
    assert torch.allclose(found, gradient.flatten().view_as(found))


def test_an_error_within_the_update_is_not_taken_for_a_missing_weight():
    model, target, x = build("linear")
    perturb(disha.inject_adapters(model, target, 2))
    block = model.qkv.disha["default"]
    block.update = lambda: block.no_such_attribute
    with pytest.raises(RuntimeError, match="the update of weight failed"):
        model(x)


def test_routing_where_a_weight_is_read():
    model, target, x = build("linear")
    disha.inject_adapters(model, target, 2, adapter="a", init="kaiming")
    disha.inject_adapters(model, target, 1, adapter="b", init="kaiming")
    names = ["b", None, "a"]
    with disha.route_adapters(model, names):
        routed = model(x)
    for name, sample, output in zip(names, x, routed, strict=True):
        disha.set_active_adapters(model, [] if name is None else name)
        torch.testing.assert_close(model(sample[None])[0], output, rtol=0, atol=1e-10)


def test_a_computed_weight_that_is_read():
    model, target, x = build("linear")
    torch.nn.utils.parametrizations.weight_norm(model.qkv)
    weight = model.qkv.weight.detach()
    perturb(disha.inject_adapters(model, target, 2))
    dense = weight + model.qkv.delta_weight(model.qkv.disha["default"])
    expected = model.proj(F.linear(x, dense, model.qkv.bias))
    assert torch.allclose(model(x), expected, rtol=0, atol=1e-10)


class Doubled(nn.Module):
    """Computes a weight of another shape than the parameter of that name."""

    def __init__(self):
        super().__init__()
        self._parameters["weight"] = nn.Parameter(torch.randn(4, 6))

    @property
    def weight(self):
        stored = self._parameters["weight"]
        return torch.cat([stored, 2 * stored])

    def forward(self, x):
        return F.linear(x, self.weight)


@pytest.mark.parametrize("method", ["bone", "bat"])
def test_a_computed_weight_may_have_another_shape_than_the_stored_one(method):
    model = nn.Sequential(Doubled())
    disha.inject_adapters(model, "0", 2, method=method, layouts={"0": "out in"}, init="kaiming")
    geometry = model[0].disha["default"].slot.layout.geometry(model[0].weight.shape)
    assert geometry == disha.Geometry(6, 8)
    assert model[0].disha["default"].config.r == 2
    assert disha.check_adapters(model, torch.randn(3, 6)).ok


class TestFacts:
    def weight(self):
        layer = disha.BoneLinear(4, 3, r=2, init="kaiming")
        return layer, layer.weight

    def test_facts_are_those_of_the_base(self):
        layer, weight = self.weight()
        base = layer.base_weight
        assert weight.shape == base.shape
        assert len(weight) == 3
        assert (weight.dtype, weight.device, weight.ndim) == (base.dtype, base.device, 2)
        assert (weight.size(), weight.stride(), weight.numel()) == (base.shape, base.stride(), 12)
        assert weight.requires_grad == base.requires_grad is False
        assert weight.is_floating_point()
        assert weight.is_contiguous()
        assert not weight.is_sparse
        assert torch.is_floating_point(weight)
        assert weight.element_size() == 4

    @pytest.mark.parametrize(
        "ask",
        [
            lambda w: w.new_zeros(2),
            lambda w: w.new_tensor([1.0, 2.0]),
            lambda w: torch.ones_like(w),
            lambda w: torch.full_like(input=w, fill_value=2.0),
            lambda w: torch.ones(2).type_as(w),
            lambda w: torch.ones(2).to(w),
            lambda w: torch.ones(2).to(tensor=w),
            lambda w: torch.result_type(torch.ones(2), w),
        ],
    )
    def test_what_only_asks_for_the_dtype_computes_nothing(self, ask):
        """A computed weight can't have dropout, so computing one would raise."""
        layer = disha.BoneLinear(4, 3, r=2, dropout=0.5, dtype=torch.float64)
        found, expected = ask(layer.weight), ask(layer.base_weight)
        assert getattr(found, "dtype", found) == torch.float64
        if isinstance(found, torch.Tensor):
            assert type(found) is torch.Tensor
            assert torch.equal(found, expected)

    @pytest.mark.parametrize(
        "view",
        [
            lambda w: w.T,
            lambda w: w.mT,
            lambda w: w.t(),
            lambda w: w.transpose(0, 1),
            lambda w: w.transpose(-1, -2),
            lambda w: w.swapaxes(axis0=0, axis1=1),
            lambda w: w.swapdims(dim0=0, dim1=1),
            lambda w: torch.t(input=w),
            lambda w: torch.transpose(input=w, dim0=0, dim1=1),
            lambda w: w[1:3],
            lambda w: w.chunk(3)[1],
            lambda w: w.split([1, 2])[1],
            lambda w: w.detach(),
            lambda w: w.data,
            lambda w: w.to(torch.float64),
            lambda w: w.double(),
            lambda w: w.contiguous(),
        ],
    )
    def test_views_stay_effective_weights(self, view):
        layer, weight = self.weight()
        dense = merged_weight(layer)
        seen = view(weight)
        assert type(seen) is type(weight)
        torch.testing.assert_close(seen + 0, view(dense))

    def test_values_of_a_new_tensor_have_the_update(self):
        layer, weight = self.weight()
        dense = merged_weight(layer)
        with pytest.warns(UserWarning, match="To copy construct from a tensor"):
            found = weight.new_tensor(weight)
        torch.testing.assert_close(found, dense)

    @pytest.mark.parametrize(
        "cut",
        [
            lambda w: w.split([1, 3], dim=1),
            lambda w: w.split([3, 1], dim=-1),
            lambda w: torch.split(w, 2, 1),
            lambda w: w.chunk(2, dim=1),
        ],
    )
    def test_columns_are_computed(self, cut):
        layer, weight = self.weight()
        dense = merged_weight(layer)
        torch.testing.assert_close(cut(weight), cut(dense))

    @pytest.mark.parametrize(
        "multiply",
        [
            lambda x, w: torch.mm(input=x, mat2=w.T),
            lambda x, w: x.mm(mat2=w.T),
            lambda x, w: torch.mv(w, vec=x[0]),
            lambda x, w: torch.mv(input=w, vec=x[0]),
            lambda x, w: torch.matmul(input=x, other=w.T),
            lambda x, w: torch.addmm(input=torch.ones(3), mat1=x, mat2=w.T),
            lambda x, w: F.normalize(input=w),
            lambda x, w: torch.where(condition=w > 0, input=w, other=torch.zeros(())),
        ],
    )
    def test_by_keywords(self, multiply):
        layer, weight = self.weight()
        x, dense = torch.randn(2, 4), merged_weight(layer)
        torch.testing.assert_close(multiply(x, weight), multiply(x, dense))

    @pytest.mark.parametrize("index", [[-1, 2, -6], [0, 5]])
    def test_rows_of_a_table_count_from_the_end_too(self, index):
        layer = disha.inject_adapters(nn.Embedding(6, 3), "", r=2, init="kaiming")
        dense = merged_weight(layer)
        at = torch.tensor(index)
        torch.testing.assert_close(layer.weight[at], dense[at])
        mask = torch.tensor([1, 0, 1, 0, 0, 1], dtype=torch.bool)
        torch.testing.assert_close(layer.weight[mask], dense[mask])

    @pytest.mark.parametrize("method", ["bone", "bat"])
    def test_sparse_inputs(self, method):
        layer = perturb(disha.inject_adapters(nn.Linear(4, 3, bias=False), "", 2, method=method))
        x = torch.randn(5, 4).relu()
        torch.testing.assert_close(layer(x.to_sparse()), layer(x))

    def test_a_parameter_by_its_name_is_the_parameter(self):
        model = disha.inject_adapters(nn.Sequential(nn.Linear(4, 3)), "0", 2)
        assert model.get_parameter("0.weight") is dict(model.named_parameters())["0.weight"]
        assert type(model[0].weight) is not nn.Parameter

    def test_everything_else_computes(self):
        layer, weight = self.weight()
        dense = merged_weight(layer)
        for compute in (torch.norm, torch.exp, lambda w: w.view(-1), lambda w: w[0, 1], torch.diag):
            found = compute(weight)
            assert type(found) is torch.Tensor
            torch.testing.assert_close(found, compute(dense))
        torch.testing.assert_close(torch.stack([weight, weight])[1], dense)
        assert str(weight) == str(dense)

    @pytest.mark.parametrize(
        "write",
        [
            lambda w: w.copy_(torch.ones(3, 4)),
            lambda w: w.fill_(1.0),
            lambda w: w.data.fill_(1.0),
            lambda w: w.detach().fill_(1.0),
            lambda w: nn.init.ones_(w),
            lambda w: nn.init.constant_(tensor=w, val=1.0),
            lambda w: w.__setitem__(slice(None), 1.0),
            lambda w: torch.add(torch.zeros(3, 4), 1.0, out=w),
            lambda w: w.zero_().add_(1.0),
            lambda w: setattr(w, "data", torch.ones(3, 4)),
        ],
    )
    def test_writes_reach_the_base(self, write):
        layer, weight = self.weight()
        parameter, blocks = layer.base_weight, layer.disha["default"].block.clone()
        with torch.no_grad():
            write(weight)
        assert layer.base_weight is parameter
        assert torch.equal(parameter, torch.ones(3, 4))
        assert torch.equal(layer.disha["default"].block, blocks)

    @pytest.mark.parametrize(("made", "name"), [(nn.Linear, "weight"), (nn.LSTM, "weight_ih_l0")])
    def test_an_operator_that_assigns_its_result_writes_into_the_base(self, made, name):
        layer = disha.inject_adapters(made(4, 3), "", r=2, init="kaiming")
        parameter = layer._parameters[name]
        expected = [one.detach() + 1.0 for one in (parameter, getattr(layer, name))]
        with torch.no_grad():
            setattr(layer, name, operator.iadd(getattr(layer, name), 1.0))  # layer.weight += 1.0
        assert layer._parameters[name] is parameter
        torch.testing.assert_close(parameter.detach(), expected[0])
        torch.testing.assert_close(getattr(layer, name).detach() + 0.0, expected[1])

    def test_a_product_into_out_acts_unless_a_gradient_would_be_lost(self):
        layer, weight = self.weight()
        x, out = torch.randn(5, 4), torch.empty(5, 2)
        with torch.no_grad(), pytest.raises(ModeError, match=r"no gradient.*exclude='lm_head'"):
            torch.mm(x, weight[1:].to(torch.float32).t(), out=out)  # as the loss of trl does
        expected = torch.mm(x, weight[1:].t()).detach()
        layer.disha["default"].block.requires_grad_(False)
        torch.mm(x, layer.weight[1:].t(), out=out)
        torch.testing.assert_close(out, expected)

    def test_a_parameter_made_of_it_is_refused_or_dense(self):
        layer, weight = self.weight()
        assert type(nn.Parameter(weight.clone()).data) is torch.Tensor
        for view in (weight, weight.data, weight.detach(), weight[:2]):
            with pytest.raises(ArgumentError, match=r"weight\.clone\(\).*layer\.base_weight"):
                nn.Parameter(view)
        with pytest.raises((RuntimeError, TypeError)):
            nn.Linear(4, 3).weight = layer.weight

    @pytest.mark.parametrize(
        "draw",
        [
            lambda w: nn.init.trunc_normal_(w, std=0.5, a=-0.1, b=0.1),
            lambda w: nn.init.trunc_normal_(w),
            lambda w: nn.init.orthogonal_(w),
            lambda w: nn.init.orthogonal_(tensor=w, gain=2.0),
            lambda w: torch.ops.aten.mul_(w, 2.0),
            lambda w: torch.ops.aten.add_.Tensor(w, w.new_ones(4)),
            lambda w: F.elu(w, inplace=True),
        ],
    )
    def test_what_is_drawn_or_changed_in_place_is_that_of_a_plain_weight(self, draw):
        layer, weight = self.weight()
        plain = layer.base_weight.detach().clone()
        found = []
        for tensor in (weight, plain):
            torch.manual_seed(3)
            with torch.no_grad():
                found.append(draw(tensor))
        assert torch.equal(layer.base_weight, plain)
        torch.testing.assert_close(found[0] + 0, merged_weight(layer))

    def test_attributes_of_the_parameter(self):
        layer, weight = self.weight()
        layer.base_weight.infshape = (4, 3)
        weight._no_weight_decay = True
        assert layer.weight.infshape == (4, 3)
        assert layer.base_weight._no_weight_decay is True
        assert not hasattr(weight, "no_such_attribute")

    def test_compiled_code_reads_attributes_of_the_parameter(self):
        layer, _ = self.weight()
        layer.base_weight.factor = 3.0
        x = torch.randn(2, 4)
        compiled = freshly_compiled(lambda x: F.linear(x, layer.weight) * layer.weight.factor)
        torch.testing.assert_close(compiled(x), 3.0 * F.linear(x, layer.weight))

    def test_hooks_are_those_of_the_base(self):
        layer, seen = disha.inject_adapters(nn.Linear(4, 3), "", 2, freeze=False), []
        handle = layer.weight.register_hook(lambda gradient: seen.append(gradient.shape))
        layer.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight))
        layer.weight.retain_grad()
        layer(torch.randn(2, 4)).sum().backward()
        assert seen[0] == (3, 4)
        assert seen[1] is layer.base_weight
        handle.remove()
        layer(torch.randn(2, 4)).sum().backward()
        assert len(seen) == 3

    @pytest.mark.parametrize(
        "write",
        [
            lambda layer: layer.weight.copy_(layer.weight),
            lambda layer: layer.weight.data.copy_(layer.weight.data),
            lambda layer: layer.weight.__setitem__(slice(None), layer.weight),
        ],
    )
    def test_written_into_itself_it_adds_no_update_twice(self, write):
        layer, _ = self.weight()
        before = layer.base_weight.detach().clone()
        with torch.no_grad():
            write(layer)
        assert torch.equal(layer.base_weight, before)

    def test_as_another_class_it_is_computed(self):
        layer, _ = self.weight()
        dense = layer.weight.as_subclass(torch.Tensor)
        torch.testing.assert_close(dense, merged_weight(layer))

    @pytest.mark.parametrize("grad", [True, False])
    @pytest.mark.parametrize("clone", [copy.deepcopy, pickled])
    def test_copies_of_it_are_dense(self, clone, grad):
        if grad and clone is pickled:
            pytest.skip("torch pickles no tensor with a graph")
        layer, _ = self.weight()
        with torch.set_grad_enabled(grad):
            copied = clone(layer.weight)
        assert type(copied) is torch.Tensor
        assert not copied.requires_grad
        torch.testing.assert_close(copied, merged_weight(layer))
        other = disha.BoneLinear(4, 3, r=2)
        other.weight.data = clone(layer).weight.data
        torch.testing.assert_close(other.base_weight, merged_weight(layer))


SAMPLES = {
    "Tensor": (
        torch.full((4, 4), 0.5, dtype=torch.float64),
        torch.ones((), dtype=torch.float64),
        torch.ones(4, dtype=torch.float64),
        torch.ones(1, 4, 4, dtype=torch.float64),
        torch.eye(4, dtype=torch.int64),
        torch.arange(4),
        torch.eye(4, dtype=torch.bool),
    ),
    "Optional[Tensor]": (torch.full((4, 4), 0.5, dtype=torch.float64),),
    "List[Optional[Tensor]]": ((torch.arange(4),),),
    "List[int]": ([4, 4],),
    "str": ("sum", "mean"),
    "bool": (True,),
    "int": (0, 1),
}
"""Type of an argument -> values to try."""


def in_place(schema):
    """Return torch's functions that a schema declares to write into their first argument."""
    name = schema.name.removeprefix("aten::")
    first = schema.arguments[0] if schema.arguments else None
    if not name.endswith("_") or name.endswith("__") or str(getattr(first, "type", "")) != "Tensor":
        return []
    owners = (torch.Tensor, torch, torch._C._nn, F)
    return [getattr(owner, name) for owner in owners if hasattr(owner, name)]


def test_the_result_of_every_write_is_the_weight_as_it_is_then():
    """Every operation of torch's schema writes into W and returns its effective weight, or raises.

    The adapter must act in a product with the result.
    """
    x, found, schemas = torch.randn(3, 4).double(), set(), torch._C._jit_get_all_schemas()
    for func, schema in ((func, one) for one in schemas for func in in_place(one)):
        more = schema.arguments[1:]
        needed = [one for one in more if not one.has_default_value()]
        values = [SAMPLES.get(str(one.type), (0.5,)) for one in needed or more[:1]]
        for given in itertools.islice(itertools.product(*values), 60):
            layer = disha.BoneLinear(4, 4, r=2, init="kaiming", dtype=torch.float64)
            try:
                result = func(layer.weight.data, *given)
            except (RuntimeError, TypeError, IndexError, ValueError, ArgumentError):
                continue
            result = layer.weight if result is None else result
            product = F.linear(x, merged_weight(layer))
            assert torch.allclose(F.linear(x, result), product, equal_nan=True), schema
            found.add(schema.name)
    assert len(found) > 130, sorted(found)
    assert {"aten::clamp_", "aten::elu_", "aten::index_put_", "aten::requires_grad_"} <= found


@pytest.mark.parametrize(
    ("written", "compiles"),
    [
        (lambda w: w.data.clamp_(-1, 1), False),
        (lambda w: w.detach().clamp_(-1, 1), True),
        (lambda w: w.detach().requires_grad_(), False),
        (lambda w: torch.mul(w.data, 1.0, out=w.data), False),
        (lambda w: torch._foreach_mul_([w.data], 2.0)[0], False),
    ],
)
def test_a_forward_that_writes_merged_and_unmerged(written, compiles):
    class Clipped(nn.Linear):
        def forward(self, x):
            return F.linear(x, written(self.weight), self.bias)

    model, x = nn.Sequential(Clipped(6, 4)).double(), torch.randn(3, 6).double()
    perturb(disha.inject_adapters(model, "0", 2))
    forward = freshly_compiled(model, fullgraph=False) if compiles else model
    expected = forward(x)
    assert not torch.allclose(expected, F.linear(x, model[0].base_weight, model[0].bias))
    assert torch.allclose(expected, F.linear(x, merged_weight(model[0]), model[0].bias))


def test_a_weight_does_not_change_its_shape_in_place():
    layer = disha.BoneLinear(4, 3, r=2)
    for change in (lambda w: w.t_(), lambda w: w.set_(torch.ones(2, 2))):
        with pytest.raises(ArgumentError, match="can't change its shape in place"):
            change(layer.weight.data)
    assert layer.weight.shape == (3, 4)


class Multiply(torch.autograd.Function):
    """A product with gradients of its own, as fused kernels have."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.T @ x


def checkpointed(x, weight):
    return checkpoint(F.linear, x, weight, use_reentrant=True)


def applied(x, weight):
    return Multiply.apply(x, weight)


USES = [applied, checkpointed]
if "def apply(" in inspect.getsource(torch.autograd.Function):  # torch 2.15 has a C++ one
    USES.append(Multiply.apply)  # kept from before the first injection


class TestWhatAsksNoTensor:
    """Torch asks an effective weight about most functions, but not about these."""

    def case(self, method="bone"):
        layer = disha.inject_adapters(nn.Linear(6, 4, bias=False).double(), "", 2, method=method)
        perturb(layer)
        return layer, layer.disha["default"].block, torch.randn(3, 6).double().requires_grad_()

    @pytest.mark.parametrize("method", ["bone", "bat"])
    @pytest.mark.parametrize("use", USES)
    def test_a_custom_function_trains_the_block(self, use, method):
        layer, block, x = self.case(method)
        output, expected = use(x, layer.weight), F.linear(x, layer.weight)
        torch.testing.assert_close(output, expected)
        output.square().sum().backward()
        (wanted,) = torch.autograd.grad(expected.square().sum(), block)
        torch.testing.assert_close(block.grad, wanted)

    @pytest.mark.skipif(torch.__version__ < "2.9", reason="the compiler of torch 2.8 sees W alone")
    def test_a_custom_function_in_compiled_code(self):
        layer, block, x = self.case()
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: Multiply.apply(x, layer.weight), backend="eager")
        expected = F.linear(x, layer.weight)
        torch.testing.assert_close(compiled(x), expected)
        (found,) = torch.autograd.grad(compiled(x).square().sum(), block)
        torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), block)[0])

    def test_a_custom_function_and_dropout(self):
        layer = disha.BoneLinear(6, 4, r=2, dropout=0.5)
        with pytest.raises(ModeError, match="the adapter's dropout can't act here"):
            Multiply.apply(torch.randn(3, 6), layer.weight)

    @pytest.mark.parametrize("compiles", [False, True])
    def test_vmap_over_a_stack(self, compiles):
        weight = nn.Parameter(torch.randn(3, 6, 4))
        experts = Made(lambda self, x: torch.vmap(torch.matmul)(x, self.weight), weight=weight)
        model, x = nn.Sequential(experts).double(), torch.randn(3, 5, 6).double()
        perturb(disha.inject_adapters(model, "0", 2, layouts={"0": "expert in out"}))
        forward = freshly_compiled(model) if compiles else model
        torch.testing.assert_close(forward(x), x @ merged_weight(model[0]))
        assert disha.check_adapters(model, x).ok

    @pytest.mark.parametrize(
        "transform",
        [
            torch.func.grad,
            lambda f: torch.func.grad(lambda w, x: torch.func.grad(f)(w, x).square().sum()),
            lambda f: torch.vmap(torch.func.grad(f), in_dims=(None, 0)),
            lambda f: lambda w, x: torch.func.jvp(lambda w: f(w, x), (w,), (torch.ones(4, 6),)),
            lambda f: lambda w, x: torch.func.vjp(lambda w: f(w, x), w)[1](torch.ones(())),
        ],
    )
    def test_transforms_that_take_the_weight(self, transform):
        layer = disha.BoneLinear(6, 4, r=2, init="kaiming")
        dense, x = merged_weight(layer).detach(), torch.randn(3, 6)
        run = transform(lambda w, x: F.linear(x, w).square().sum())
        torch.testing.assert_close(run(layer.weight, x), run(dense, x))

    def test_the_gradient_of_a_weight_is_that_of_the_base(self):
        layer = disha.inject_adapters(nn.Linear(6, 4), "", 2, init="kaiming", freeze=False)
        x = torch.randn(3, 6)
        (found,) = torch.autograd.grad(layer(x).sum(), layer.weight)
        torch.testing.assert_close(found, x.sum(0).expand(4, 6))
        frozen = disha.BoneLinear(6, 4, r=2)
        with pytest.raises(RuntimeError, match="does not require grad"):
            torch.autograd.grad(frozen(x).sum(), frozen.weight)


class Sequences(nn.Module):
    """Reads jagged nested tensors of indices."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 3, bias=False)

    def forward(self, indices):
        return self.up(self.embed(indices)) @ self.down.weight.mT


class TestJagged:
    """`NestedTensor.__torch_function__` comes before that of the weight, and asks no weight."""

    sequences = (torch.tensor([1, 2]), torch.tensor([3, 4, 6]))

    def model(self, **options):
        model = disha.inject_adapters(Sequences().double(), ".", 2, init="kaiming", **options)
        return perturb(model), torch.nested.nested_tensor(list(self.sequences), layout=torch.jagged)

    @pytest.mark.parametrize("method", ["bone", "bat"])
    @pytest.mark.parametrize("compiles", [False, True])
    def test_outputs_and_gradients_are_those_of_each_sequence(self, method, compiles):
        model, nested = self.model(method=method)
        forward = freshly_compiled(model) if compiles else model
        outputs = forward(nested).unbind()
        expected = [model(indices) for indices in self.sequences]
        torch.testing.assert_close(list(outputs), expected)
        blocks = list(disha.adapter_parameters(model))
        found, wanted = (
            torch.autograd.grad(sum(output.square().sum() for output in some), blocks)
            for some in (outputs, expected)
        )
        torch.testing.assert_close(found, wanted)

    def test_the_lengths_stay_those_of_the_input(self):
        model, nested = self.model()
        assert (model.embed(nested) + model.down(model.up(model.embed(nested)))[..., :1]).is_nested

    def test_dropout(self):
        model, nested = self.model(dropout=0.5)
        first, second = (model.train().up(model.embed(nested)).values() for _ in range(2))
        assert not torch.equal(first, second)

    def test_ragged_features_are_refused_as_by_torch(self):
        model, _ = self.model()
        ragged = torch.nested.nested_tensor([torch.randn(4, 4).double()], layout=torch.jagged)
        for layer in (model.up, nn.Linear(4, 6).double()):
            with pytest.raises((ValueError, RuntimeError), match=r"contiguous|ragged"):
                layer(ragged.transpose(1, 2))

    def test_a_route_is_refused(self):
        model, nested = self.model()
        with (
            disha.route_adapters(model, ["default", None]),
            pytest.raises(ModeError, match="can't be routed here"),
        ):
            model(nested)


class TestWhatGoesAroundTorchFunction:
    """As C++ extensions do, and classes whose `__torch_function__` switches that of others off."""

    def multiply(self, x, weight):
        with torch._C.DisableTorchFunctionSubclass():
            return F.linear(x, weight)

    def test_without_gradients_the_weight_is_computed(self):
        layer = disha.BoneLinear(6, 4, r=2, init="kaiming")
        x = torch.randn(3, 6)
        with torch.no_grad():
            output = self.multiply(x, layer.weight)
        torch.testing.assert_close(output, F.linear(x, merged_weight(layer)))

    def test_a_block_that_would_get_no_gradient_raises(self):
        layer = disha.BoneLinear(6, 4, r=2)
        with pytest.raises(ModeError, match=r"aten\.\w+\.default.*\(4, 6\).*weight\.clone\(\)"):
            self.multiply(torch.randn(3, 6), layer.weight)
        torch.testing.assert_close(
            self.multiply(torch.ones(1, 6), layer.weight.clone()),
            F.linear(torch.ones(1, 6), layer.weight),
        )

    def test_a_frozen_block_lets_the_gradient_of_the_input_pass(self):
        layer = perturb(disha.BoneLinear(6, 4, r=2))
        layer.requires_grad_(False)
        x = torch.randn(3, 6, requires_grad=True)
        (found,) = torch.autograd.grad(self.multiply(x, layer.weight).sum(), x)
        torch.testing.assert_close(found, merged_weight(layer).sum(0).expand(3, 6))

    def test_a_write_goes_to_the_base(self):
        layer = disha.BoneLinear(6, 4, r=2, init="kaiming")
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            layer.weight.fill_(2.0)
        assert torch.equal(layer.base_weight, torch.full((4, 6), 2.0))


@pytest.mark.parametrize("method", ["bone", "bat"])
def test_a_product_of_stacks_with_a_bias(method):
    model = nn.Sequential(nn.Linear(2, 2))
    model.mix = nn.Parameter(torch.randn(3, 640, 4))
    x, bias = torch.randn(3, 5, 640), torch.randn(3, 1, 4)
    before = torch.baddbmm(bias, x, model.mix)
    disha.inject_adapters(model, "mix", 4, method=method, layouts={"mix": "expert in out"})
    if method == "bone":
        assert torch.equal(torch.baddbmm(bias, x, model.mix), before)
    perturb(model)
    dense = (model.mix + 0).detach()
    found, expected = torch.baddbmm(bias, x, model.mix), torch.baddbmm(bias, x, dense)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    turned = torch.baddbmm(bias.mT, dense.mT, x.mT)
    torch.testing.assert_close(found.mT, turned, rtol=1e-3, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = torch.baddbmm(bias, x, model.mix), torch.baddbmm(bias, x, dense)
    assert found.dtype == expected.dtype == torch.bfloat16
