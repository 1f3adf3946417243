"""Whoever reads an adapted weight sees the update."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import disha
from disha import ModeError
from disha.layers.adapted import AdaptedLayer
from tests import reference
from tests.conftest import (
    Made,
    assert_unchanged,
    freshly_compiled,
    needs_fully_shard,
    perturb,
    seed_torch,
    snapshot,
)
from tests.reference import METHODS


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
    "linear": (Reader, "qkv", (3, 6)),
    "in a list": (Listed, "layers.1", (3, 6)),
    "in a loop": (Looped, "layers", (3, 6)),
    "standardised": (held, "conv", (3, 4, 5)),
    "by keywords": (ByKeywords, "layer", (3, 6)),
    "below": (below, "qkv", (3, 6)),
    "called": (Both, "conv", (3, 4, 5)),
    "read": (Both, "conv", (3, 4, 2)),
    "tied by a function": (tied_by_function, "embed", torch.tensor([[1, 6], [0, 3]])),
}
"""Name -> how to build the model, the target, and the input or its shape."""


def build(name, dtype=torch.float64):
    seed_torch(0)
    cls, target, x = CASES[name]
    model = cls().to(dtype)
    return model, target, x if isinstance(x, torch.Tensor) else torch.randn(x, dtype=dtype)


def delta_of(layer):
    block = layer.disha["default"]
    weight = layer.base_weight.detach()
    pattern = block.spec.layout.pattern
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

    @pytest.mark.parametrize("is_adapted", [False, True])
    def test_tying_after_the_injection(self, is_adapted):
        model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
        disha.inject_adapters(model, "." if is_adapted else "embed", 2)
        head = model["head"]
        before = head._parameters["weight"]
        with pytest.raises(TypeError, match=r"cannot assign .* as parameter 'weight'"):  # torch's
            head.weight = model["embed"].weight
        assert head._parameters["weight"] is before

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
    block.make_update = lambda: block.no_such_attribute
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


@pytest.mark.parametrize("method", METHODS)
def test_a_computed_weight_may_have_another_shape_than_the_stored_one(method):
    model = nn.Sequential(Doubled())
    disha.inject_adapters(model, "0", 2, method=method, layouts={"0": "out in"}, init="kaiming")
    geometry = model[0].disha["default"].spec.layout.geometry(model[0].weight.shape)
    assert geometry == disha.Geometry(6, 8)
    assert model[0].disha["default"].config.r == 2
    assert disha.check_adapters(model, torch.randn(3, 6)).ok


class Marked(torch.Tensor):
    """A class of tensors of some other library."""


def test_a_weight_of_another_class_of_tensors_is_read_with_its_updates():
    layer = disha.inject_adapters(nn.Linear(6, 4), "", 2, init="kaiming")
    expected = layer.weight + 0
    layer._parameters["weight"] = nn.Parameter(layer.base_weight.as_subclass(Marked))
    assert type(layer.weight) is Marked
    assert torch.equal(layer.weight, expected)


def test_a_parameter_by_its_name_is_the_parameter():
    model = disha.inject_adapters(nn.Sequential(nn.Linear(4, 3)), "0", 2)
    assert model.get_parameter("0.weight") is dict(model.named_parameters())["0.weight"]
    assert type(model[0].weight) is not nn.Parameter


def test_a_weight_that_is_set_to_a_tensor_can_be_deleted():
    """As FSDP and pruning do, while the parameter has another name."""
    layer = disha.inject_adapters(nn.Linear(4, 3), "", 2)
    layer.weight = layer._parameters.pop("weight").detach()
    del layer.weight
    assert not hasattr(layer, "weight")


def test_a_feature_extractor_of_torchvision():
    """It traces the model and copies what is read."""
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = perturb(disha.inject_adapters(nn.Sequential(Reader()), ".", 2))
    x = torch.randn(3, 6)
    extractor = extraction.create_feature_extractor(model.eval(), {"0.proj": "output"})
    torch.testing.assert_close(extractor(x)["output"], model(x))
