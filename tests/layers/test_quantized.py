"""Quantised bases, held against a plain linear layer on the dequantised weight."""

import copy
import json
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16
from bitsandbytes.nn import (
    Embedding4bit,
    Embedding8bit,
    Linear4bit,
    Linear8bitLt,
    LinearFP4,
    LinearNF4,
)
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from torchao.quantization import (
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    PerGroup,
    quantize_,
    to_nf4,
)
from torchao.quantization.qat import QATConfig
from transformers.integrations.fbgemm_fp8 import FbgemmFp8Linear
from transformers.integrations.finegrained_fp8 import FP8Embedding, FP8Linear
from transformers.integrations.gemma_quant import QuantizedLinear
from transformers.integrations.gguf.utils import GgufLinear
from transformers.integrations.higgs import HiggsLinear
from transformers.integrations.metal_quantization import MetalLinear

import disha
from disha import ArgumentError, MergeError, TargetError
from disha.layers import quantized
from disha.layers.quantized import quantized_weight
from tests import reference
from tests.conftest import (
    assert_unchanged,
    freshly_compiled,
    near,
    perturb,
    pickled,
    refused,
    saved_by_torch,
    seed_torch,
    snapshot,
)
from tests.functional.updates import bone_delta
from tests.quantized_bases import (
    BASES,
    IN,
    MERGEABLE,
    OUT,
    READABLE,
    CpuFP8GroupedLinear,
    base,
    decompress,
)

WAYS = ("8-bit", "nf4", "fp4", "torchao")
METHODS = reference.KINDS


def quantize(dense: nn.Linear, way: str, **options) -> nn.Linear:
    """Return a quantised layer with the weight and the bias of a dense one."""
    if way == "torchao":
        quantize_(dense, Int8WeightOnlyConfig(**options))
        return dense
    sizes = (dense.in_features, dense.out_features, dense.bias is not None)
    if way == "8-bit":
        layer = Linear8bitLt(*sizes, has_fp16_weights=False, **options)
    else:
        layer = {"nf4": LinearNF4, "fp4": LinearFP4}[way](*sizes, **options)
    layer.to(dense.weight.dtype).load_state_dict(dense.state_dict())
    return layer.to("cpu")  # quantises


def linear(way, in_features=10, out_features=12, bias=True, dtype=torch.float32, **options):
    seed_torch(0)
    dense = nn.Linear(in_features, out_features, bias, dtype=dtype)
    return quantize(dense, way, **options)


def dense_weight(layer: nn.Linear) -> torch.Tensor:
    """Return W as the library means it, in float32."""
    weight = layer.weight
    if isinstance(layer, Linear8bitLt):
        scales = layer.state.SCB if weight.SCB is None else weight.SCB
        return weight.data.float() * scales[:, None] / 127
    if isinstance(layer, Linear4bit):
        return dequantize_4bit(weight.data, weight.quant_state).float()
    return weight.qdata.float() * weight.scale.float().view(layer.out_features, -1)


def inject(model, method, r=4, target="all-linear", **options):
    return disha.inject_adapters(model, target, r, **reference.settings_of(method, 4), **options)


def adapted(way, method, r=4, **options):
    return perturb(inject(linear(way, **options), method, r))


def close(actual, expected, limit=1e-5):
    near(actual, expected, limit)


@pytest.fixture(autouse=True)
def not_packed(monkeypatch):
    """Keep bitsandbytes from packing weights for CPUs with AVX512-BF16."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


class Small(nn.Module):
    """Quantised and plain layers, one of them without a bias, and a norm."""

    def __init__(self, way: str, width: int = 64) -> None:
        super().__init__()
        self.first = linear(way, width, 2 * width)
        self.norm = nn.LayerNorm(2 * width)
        self.second = linear(way, 2 * width, width, bias=False)
        seed_torch(2)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = self.norm(torch.tanh(self.first(x)))
        return self.head(torch.relu(self.second(x)))


@pytest.fixture
def x(request):
    width = IN if "name" in request.fixturenames else 10
    return torch.randn(3, 2, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
class TestEveryWay:
    def test_outputs_and_gradients_are_those_of_the_dense_weight(self, way, method, x):
        layer = linear(way).requires_grad_(False)
        before = [layer.train(training)(x) for training in (True, False)]
        inject(layer, method)
        assert all(map(torch.equal, before, [layer.train(on)(x) for on in (True, False)]))
        perturb(layer)
        disha.set_adapter_scale(layer, 0.5)
        block, leaf = disha.adapter_parameters(layer)[0], x.clone().requires_grad_()
        twin, twin_x = block.detach().clone().requires_grad_(), x.clone().requires_grad_()
        output = layer.train()(leaf)
        expected = reference.linear(twin_x, dense_weight(layer), layer.bias, [(method, twin, 0.5)])
        close(output, expected)
        torch.tanh(output).sum().backward()
        torch.tanh(expected).sum().backward()
        close(block.grad, twin.grad)
        close(leaf.grad, twin_x.grad)
        assert layer.weight.grad is None

    def test_adapters_add_up_switch_off_and_are_routed(self, way, method, x):
        layer = linear(way)
        base = layer(x)
        inject(layer, method, adapter="a")
        perturb(inject(layer, "bone", r=3, adapter="b"))
        disha.set_active_adapters(layer, ["a", "b"])
        blocks = [(method, layer.disha["a"].block, 1.0), ("bone", layer.disha["b"].block, 1.0)]
        close(layer(x), reference.linear(x, dense_weight(layer), layer.bias, blocks))
        with disha.adapters_disabled(layer):
            assert torch.equal(layer(x), base)
        names = ["a", None, "b"]
        with disha.route_adapters(layer, names):
            routed = layer(x)
            with pytest.raises(disha.ArgumentError, match="needs samples"):
                layer(x[0, 0])
        for sample, name in enumerate(names):
            disha.set_active_adapters(layer, [] if name is None else name)
            close(routed[sample : sample + 1], layer(x[sample : sample + 1]))

    def test_file_round_trip_onto_a_freshly_quantized_base(self, way, method, tmp_path):
        model = perturb(inject(Small(way), method))
        disha.save_adapter(model, tmp_path / "a")
        fresh = Small(way)
        disha.load_adapter(fresh, tmp_path / "a")
        x = torch.randn(2, 64)
        for training in (True, False):
            assert torch.equal(fresh.train(training)(x), model.train(training)(x))

    def test_dense_merge_computes_the_same_and_comes_back_bit_for_bit(self, way, method, x):
        layer = adapted(way, method)
        disha.set_adapter_scale(layer, 0.5)
        expected, weight, before = layer(x), layer.weight, snapshot(layer)
        for _ in range(3):
            disha.merge_adapters(layer, dense=True)
            merged, stand_in = layer(x), layer.weight
            assert torch.equal(layer(**{"input" if way == "torchao" else "x": x}), merged)
            disha.unmerge_adapters(layer)
        close(merged, expected)
        assert type(stand_in) is nn.Parameter
        assert (stand_in.dtype, stand_in.shape) == (torch.float32, (12, 10))
        assert not stand_in.requires_grad
        assert layer.weight is weight
        assert_unchanged(layer, before)
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("way", WAYS)
class TestMixedModel:
    def test_all_linear_takes_quantized_and_plain_layers(self, way):
        model, dense, x = Small(way), Small("torchao"), torch.randn(2, 64)
        dense.first, dense.second = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)
        before, expected = model(x), disha.plan_adapters(dense, "all-linear", 8)
        plan = disha.plan_adapters(model, "all-linear", 8)
        inject(model, "bone", r=8)
        assert torch.equal(model(x), before)
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trained == [f"{n}.disha.default.bone_block" for n in ("first", "second", "head")]
        for counts in (plan, disha.summary(model)):
            assert (counts.total, counts.trainable) == (expected.total, expected.trainable)

    def test_the_block_is_float32_and_the_output_has_the_bases_dtype(self, way, x):
        layer = linear(way, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            in_autocast = layer(x.bfloat16()).dtype
        plain = layer(x.bfloat16())
        inject(layer, "bat")
        inject(layer, "bat", adapter="bf16", dtype=torch.bfloat16)
        disha.set_active_adapters(layer, "default")
        perturb(layer)
        blocks = list(disha.adapter_parameters(layer))
        assert [block.dtype for block in blocks] == [torch.float32, torch.bfloat16]
        bias, weight = layer.bias.float(), dense_weight(layer)
        expected = reference.linear(x, weight, bias, [("bat", blocks[0], 1.0)])
        for cast, dtype in ((False, plain.dtype), (True, in_autocast)):
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                output = layer(x.bfloat16())
            assert output.dtype == dtype
            close(output.float(), expected, 0.05)

    def test_a_merge_has_to_be_asked_to_be_dense(self, way):
        model = inject(Small(way), "bat")
        with refused(model, MergeError, r"first.weight is quantised \(.*pass dense=True"):
            disha.merge_adapters(model)

    def test_a_dense_merge_leaves_a_plain_model(self, way):
        model, x = inject(Small(way), "bat"), torch.randn(2, 64)
        perturb(model)
        expected = model(x)
        disha.merge_adapters(model, dense=True, unload=True)
        assert type(model.first) is nn.Linear
        close(model(x), expected)
        plain = Small("torchao")
        plain.first, plain.second = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)
        plain.load_state_dict(model.state_dict())
        close(plain(x), expected)

    def test_copies(self, way, x):
        layer = adapted(way, "bat")
        expected, twins = layer(x), [copy.deepcopy(layer)]
        if way != "torchao":  # whose weights can't be pickled
            twins += [pickled(layer), saved_by_torch(layer)]
        disha.merge_adapters(layer, dense=True)
        twins.append(copy.deepcopy(layer))
        disha.unmerge_adapters(twins[-1])
        perturb(layer, seed=5)
        for twin in twins:
            assert type(twin) is type(twins[0])
            assert torch.equal(twin(x), expected)
            disha.merge_adapters(twin, dense=True)
            close(twin(x), expected)
            disha.unmerge_adapters(twin)
            assert torch.equal(twin(x), expected)

    def test_a_subclass_keeps_its_forward_and_refuses_to_merge(self, way, x):
        layer = linear(way)
        forward = type(layer).forward
        layer.__class__ = type(
            "Doubled", (type(layer),), {"forward": lambda self, *x: 2 * forward(self, *x)}
        )
        base = layer(x)
        perturb(inject(layer, "bat"))
        block = disha.adapter_parameters(layer)[0]
        delta = reference.bat_delta_weight(dense_weight(layer), block)
        close(layer(x), base + x @ delta.T)  # what a dense merge would not compute
        with refused(layer, MergeError, "is a Doubled with a forward of its own"):
            disha.merge_adapters(layer, dense=True)

    def test_what_is_not_quantized_merges_as_ever(self, way):
        model = perturb(inject(Small(way), "bone", target="head"))
        weight, kept = model.head.base_weight.clone(), model.first.weight
        disha.merge_adapters(model)
        assert not torch.equal(model.head.weight, weight)
        assert model.first.weight is kept
        disha.unmerge_adapters(model)
        assert torch.equal(model.head.base_weight, weight)

    def test_a_dense_merge_merges_both(self, way):
        model, x = inject(Small(way), "bat"), torch.randn(2, 64)
        perturb(model)
        expected, first = model(x), model.first.weight
        disha.merge_adapters(model, dense=True)
        close(model(x), expected)
        with pytest.raises(MergeError, match="while adapters are merged"):
            inject(model, "bone", adapter="other")
        with pytest.raises(MergeError, match="while adapters are merged"):
            model.load_state_dict({"first.weight": torch.zeros(128, 64)}, strict=False)
        disha.unmerge_adapters(model)
        assert model.first.weight is first
        assert torch.equal(model(x), expected)

    def test_values_that_are_not_finite_are_refused(self, way):
        model = inject(Small(way), "bone", target="first|second")
        model.second.disha["default"].block.data.fill_(float("inf"))
        with refused(model, MergeError, r"second.weight gives values that are not finite"):
            disha.merge_adapters(model, dense=True)

    def test_a_shared_layer_or_weight(self, way):
        model = nn.Sequential(linear(way, 64, 64), linear(way, 64, 64))
        model[1].weight = model[0].weight
        inject(model, "bone", target="^0$")
        with refused(model, MergeError, r"0.weight is shared with 1.weight"):
            disha.merge_adapters(model, dense=True)
        disha.merge_adapters(model, dense=True, untie=True)
        assert model[0].weight is not model[1].weight
        disha.unmerge_adapters(model)
        assert model[0].weight is model[1].weight

    def test_quantized_weights_can_not_be_trained_beside_an_adapter(self, way):
        model = Small(way)
        with refused(model, ArgumentError, r"first.weight: it is quantised"):
            disha.inject_adapters(model, "head", 4, also_train=r"first\.weight")

    def test_file_from_and_onto_a_dense_base(self, way, tmp_path, recwarn):
        dense, model = nn.Sequential(nn.Linear(64, 64)), nn.Sequential(linear(way, 64, 64))
        perturb(inject(dense, "bone"))
        disha.save_adapter(dense, tmp_path / "dense")
        disha.load_adapter(model, tmp_path / "dense")
        assert torch.equal(model[0].disha["default"].block, dense[0].disha["default"].block)
        disha.save_adapter(model, tmp_path / "quantised")
        disha.load_adapter(dense, tmp_path / "quantised", adapter="back")
        assert disha.inspect_adapter(tmp_path / "quantised").layers[0].base is None
        assert not [w for w in recwarn if w.category is disha.AdapterFileWarning]


class TestBitsandbytes:
    @pytest.mark.parametrize(
        ("storage", "nested"),
        [(torch.uint8, False), (torch.bfloat16, True), (torch.float32, False)],
    )
    def test_storages_and_statistics(self, storage, nested, x):
        layer = adapted("nf4", "bat", compress_statistics=nested, quant_storage=storage)
        block = disha.adapter_parameters(layer)[0]
        assert block.dtype == torch.float32
        expected = reference.linear(x, dense_weight(layer), layer.bias, [("bat", block, 1.0)])
        close(layer(x), expected)
        disha.merge_adapters(layer, dense=True)
        close(layer(x), expected)

    @pytest.mark.skipif(
        not has_avx512bf16(), reason="only on CPUs with AVX512-BF16 does bitsandbytes pack weights"
    )
    def test_a_weight_that_its_forward_has_packed_is_refused(self):
        layer = quantize(nn.Linear(128, 64), "nf4").requires_grad_(False)
        layer.support_avx512bf16_for_cpu = True
        layer.eval()(torch.randn(1, 128))
        before = type(layer)
        with pytest.raises(disha.ModeError, match="before the model runs in evaluation mode"):
            inject(layer, "bone", r=16)
        assert type(layer) is before

    def test_8bit_in_eval_mode_adds_the_update_to_the_rounded_product(self, x):
        layer = linear("8-bit", 64, 64).eval()
        x = torch.randn(5, 64)
        base = layer(x)
        perturb(inject(layer, "bat"))
        block = disha.adapter_parameters(layer)[0]
        delta = reference.bat_delta_weight(dense_weight(layer), block)
        close(layer(x), base + x @ delta.T)

    @pytest.mark.parametrize(
        ("compute", "expected"), [(torch.bfloat16, torch.bfloat16), (None, torch.float16)]
    )
    def test_a_dense_merge_is_in_the_compute_dtype(self, compute, expected):
        layer = inject(linear("nf4", dtype=torch.float16, compute_dtype=compute), "bone")
        disha.merge_adapters(layer, dense=True)
        assert layer.weight.dtype == expected
        assert layer(torch.randn(2, 10)).dtype == torch.float32

    @pytest.mark.parametrize("way", ["8-bit", "nf4"])
    def test_quantizing_may_follow_injection(self, way, x):
        options = {"has_fp16_weights": False} if way == "8-bit" else {"quant_type": way}
        layer = inject({"8-bit": Linear8bitLt, "nf4": Linear4bit}[way](10, 12, **options), "bat")
        perturb(layer)
        layer.to("cpu")
        block = disha.adapter_parameters(layer)[0]
        close(layer(x), reference.linear(x, dense_weight(layer), layer.bias, [("bat", block, 1.0)]))

    def test_8bit_over_dense_weights_refuses_to_merge(self):
        layer = Linear8bitLt(10, 12)  # quantises in its forward, and keeps what it got
        perturb(inject(layer, "bone"))
        with refused(layer, MergeError, "would not compute the same"):
            disha.merge_adapters(layer, dense=True)

    @pytest.mark.parametrize("make", [Embedding4bit, Embedding8bit])
    def test_embeddings(self, make):
        embedding = make(20, 64).to("cpu")
        indices = torch.arange(20).view(4, 5)
        weight = embedding(indices).view(20, 64)
        inject(embedding, "bat", adapter="bat", target="^$")
        inject(embedding, "bone", target="^$")
        assert torch.equal(embedding(indices), weight[indices])
        perturb(embedding)
        blocks = [embedding.disha[name].block for name in ("default", "bat")]
        delta = reference.layout_delta_weight("bone", "index out", blocks[0], weight)
        close(embedding(indices), (weight + delta)[indices])
        disha.set_active_adapters(embedding, "bat")
        delta = reference.bat_delta_weight(weight.T, blocks[1]).T
        close(embedding(indices), (weight + delta)[indices])
        with pytest.raises(MergeError, match="quantised"):
            disha.merge_adapters(embedding)


class TestTensorSubclasses:
    def test_nf4(self):
        layer = nn.Linear(64, 64)
        layer.weight = nn.Parameter(to_nf4(layer.weight.data, 64, 64), False)
        weight = layer.weight.get_original_weight()
        perturb(inject(layer, "bat", r=16))
        x = torch.randn(3, 64)
        block = disha.adapter_parameters(layer)[0]
        close(layer(x), reference.linear(x, weight, layer.bias, [("bat", block, 1.0)]))

    def test_compiles_to_one_graph(self):
        model = perturb(inject(nn.Sequential(linear("torchao"), linear("torchao", 12, 8)), "bat"))
        x = torch.randn(3, 10)
        compiled = freshly_compiled(model)
        close(compiled(x), model(x))


class Owner(nn.Module):
    """Reads the weight of a layer instead of calling it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.qkv = linear(way)
        self.out = linear(way, 12, 10)

    def forward(self, x):
        return self.out(F.linear(x, self.qkv.weight.dequantize()))


def test_a_quantized_weight_that_its_owner_reads_is_named(x):
    model = inject(Owner("torchao"), "bone", target="qkv|out")
    report = disha.check_adapters(model, x)
    assert not report.ok
    assert [one.name for one in report.problems] == ["qkv"]
    assert not report.problems[0].acts


def test_a_hook_that_was_there_before_sees_the_update(x):
    model = nn.Sequential(linear("torchao"))
    seen = []
    model[0].register_forward_hook(lambda layer, args, output: seen.append(output))
    assert inject(model, "bone")(x) is seen[0]


@pytest.fixture
def eager():
    """Do not compile the functions of BitNet's layers."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def unread(monkeypatch):
    """W is never read."""

    def fail(*args):
        raise AssertionError("W was read")

    for owner in ("disha.layers.quantized.dequantize", "disha.layers.quantized._read_subclass"):
        monkeypatch.setattr(owner, fail)


def adapted_base(name):
    return perturb(inject(nn.Sequential(base(name)), "bone", r=6))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", BASES)
class TestEveryBase:
    """Bone over each kind of quantised base; W is never read."""

    def test_all_linear_reaches_it_and_injection_changes_no_bit(self, name, x, unread):
        model = nn.Sequential(base(name))
        before = model(x)
        (planned,) = disha.plan_adapters(model, "all-linear", 6).layers
        assert (planned.name, planned.in_features, planned.out_features) == ("0", IN, OUT)
        inject(model, "bone", r=6)
        assert torch.equal(model(x), before)
        assert model[0].disha["default"].block.dtype == torch.float32

    def test_update_is_exactly_the_shard_sum_times_the_block(self, name, x, unread):
        plain = base(name)(x)
        model = adapted_base(name)
        disha.set_adapter_scale(model, 0.5)
        block = model[0].disha["default"].block
        assert torch.equal(model(x), plain + bone_delta(x, block, OUT, 0.5))
        delta = reference.bone_delta_weight(block, IN, OUT)
        close(model(x), plain + 0.5 * x @ delta.T)
        close(model[0].delta_weight(model[0].disha["default"]), delta)

    def test_gradients_of_block_and_input(self, name, x, unread):
        weights = torch.randn(3, 2, OUT, generator=torch.Generator().manual_seed(2))
        x.requires_grad_()
        try:
            (of_base,) = torch.autograd.grad((base(name)(x) * weights).sum(), x)
        except RuntimeError:  # the base gives no gradient
            of_base = None
        model = adapted_base(name)
        block = model[0].disha["default"].block
        delta = reference.bone_delta_weight(block.detach(), IN, OUT)
        if of_base is None and name != "awq":
            x = x.detach()
        (model(x) * weights).sum().backward()
        sums = reference.shard_sum(x.detach(), 6)
        close(block.grad, torch.einsum("abr,abo->ro", sums, weights))
        if of_base is not None or name == "awq":
            close(x.grad, weights @ delta + (0 if of_base is None else of_base))

    def test_merging(self, name, x):
        model = adapted_base(name)
        expected, before = model(x), snapshot(model)
        for dense in (False, True)[: 1 if name in MERGEABLE else 2]:
            with refused(model, MergeError, r"0.weight is|a forward of its own"):
                disha.merge_adapters(model, dense=dense)
        if name in MERGEABLE:
            disha.merge_adapters(model, dense=True)
            close(model(x), expected, 0.02 if "dynamic" in name else 1e-5)
            disha.unmerge_adapters(model)
        assert_unchanged(model, before)
        assert torch.equal(model(x), expected)

    def test_check_adapters(self, name, x):
        model = inject(nn.Sequential(base(name), nn.Linear(OUT, 4)), "bone", r=4)
        report = disha.check_adapters(model, x)
        assert report.ok, str(report)


@pytest.mark.parametrize("name", ["gptq", "hqq", "fp8", "compressed", "torchao int8"])
class TestLawsOverQuantizedBases:
    """One without a weight, a state, forward or tensor of its own, and a weight with scales."""

    def test_state_dict_and_file(self, name, x, tmp_path, unread):
        model = adapted_base(name)
        assert "0.disha.default.bone_block" in model.state_dict()
        assert list(disha.adapter_state_dict(model)) == ["0.disha.default.bone_block"]
        disha.save_adapter(model, tmp_path / "a")
        fresh, other = nn.Sequential(base(name)), nn.Sequential(base(name))
        disha.load_adapter(fresh, tmp_path / "a")
        inject(other, "bone", r=6)
        disha.load_adapter_state_dict(other, disha.adapter_state_dict(model))
        for one in (fresh, other):
            assert torch.equal(one(x), model(x))

    def test_several_adapters_disabling_and_routing(self, name, x, unread):
        model = nn.Sequential(base(name))
        plain = model(x)
        inject(model, "bone", r=6, adapter="a")
        perturb(inject(model, "tile", r=4, adapter="b"))
        blocks = {one: model[0].disha[one].block for one in "ab"}
        deltas = {one: bone_delta(x, block, OUT) for one, block in blocks.items()}
        disha.set_active_adapters(model, ["a", "b"])
        close(model(x), plain + deltas["a"] + deltas["b"])
        with disha.adapters_disabled(model):
            assert torch.equal(model(x), plain)
        with disha.route_adapters(model, ["b", None, "a"]):
            routed = model(x)
        close(routed[0], (plain + deltas["b"])[0])
        assert torch.equal(routed[1], plain[1])
        close(routed[2], (plain + deltas["a"])[2])

    def test_removal_restores_everything(self, name, x):
        layer = base(name)
        expected, before, buffers = layer(x), snapshot(layer), dict(layer.named_buffers())
        perturb(inject(layer, "bone", r=6))
        layer(x)
        disha.remove_adapters(layer)
        assert_unchanged(layer, before)
        assert all(layer.get_buffer(name) is buffer for name, buffer in buffers.items())
        assert torch.equal(layer(x), expected)

    def test_copies_and_pickles(self, name, x):
        model = adapted_base(name)
        expected = model(x)
        twins = [copy.deepcopy(model)]
        if goes_through(pickled, base(name)):
            twins.append(pickled(model))
        if goes_through(saved_by_torch, base(name)):
            twins.append(saved_by_torch(model))
        perturb(model, seed=5)
        for twin in twins:
            assert torch.equal(twin(x), expected)
            plain = disha.remove_adapters(twin)(x)
            assert torch.equal(plain, base(name)(x))

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    def test_modes(self, name, x, unread):
        model = adapted_base(name)
        expected = model(x)
        close(torch.func.functional_call(model, dict(model.named_parameters()), (x,)), expected)
        close(checkpoint(model, x, use_reentrant=False), expected)
        with torch.inference_mode():
            close(model(x).clone(), expected)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", sorted(READABLE))
def test_bat_over_a_weight_that_can_be_read(name, monkeypatch):
    model, x = nn.Sequential(base(name)), torch.randn(3, 2, IN)
    before = model(x)
    perturb(inject(model, "bat", r=6))
    assert model[0].base_weight.shape == (OUT, IN)
    delta = reference.bat_delta_weight(model[0].base_weight, model[0].disha["default"].block)
    close(model(x), before + x @ delta.T)
    dense, read = [], quantized.weight_for

    def noted(*given):
        weight = read(*given)
        dense.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(quantized, "weight_for", noted)
    output = model(x)
    assert [weight() for weight in dense] == [None]  # not kept,
    output.sum().backward()
    assert len(dense) == 2  # but read again


@pytest.mark.parametrize("name", sorted(BASES.keys() - READABLE))
def test_bat_over_a_weight_that_can_not_be_read(name):
    model = nn.Sequential(base(name), nn.Linear(OUT, 4))
    buffers = dict(model.named_buffers())
    with refused(model, TargetError, r"is quantised .*as method 'bat' requires.*'bone'"):
        disha.inject_adapters(model, "0", 6, method="bat")
    assert all(model.get_buffer(name) is buffer for name, buffer in buffers.items())
    assert disha.plan_adapters(model, "all-linear", 6, method="bat").skipped[0].name == "0"
    with pytest.raises(ArgumentError, match="can't be read as numbers"):
        _ = inject(model, "bone")[0].base_weight


def goes_through(way, plain):
    """Whether the base allows it: torchao's and some fp8 layers can't be pickled."""
    try:
        way(plain)
    except (AttributeError, pickle.PicklingError):
        return False
    return True


@pytest.mark.parametrize("name", ["gptq", "compressed", "torchao float8"])
def test_quantized_bases_compile_to_one_graph(name):
    model = perturb(inject(nn.Sequential(base(name)), "bone"))
    x = torch.randn(3, IN)
    close(freshly_compiled(model)(x), model(x))


@pytest.mark.parametrize("way", ["nf4", "torchao"])
@pytest.mark.parametrize("method", METHODS)
def test_rows_of_a_quantized_weight(way, method):
    model = nn.Sequential(linear(way, 64, 12))
    x = torch.randn(3, 64)
    plain = model(x)
    rows = [(0, 4), (8, 12)]
    perturb(inject(model, method, rows={"^0$": rows}))
    layer, kept = model[0], torch.tensor([*range(4), *range(8, 12)])
    block = layer.disha["default"].block
    delta = torch.zeros(12, 64)
    part = dense_weight(layer)[kept]
    delta[kept] = reference.delta_weight(method, part, block)
    close(layer.delta_weight(layer.disha["default"]), delta)
    close(model(x), plain + x @ delta.T)
    with pytest.raises(TargetError, match="out of range"):
        inject(nn.Sequential(linear(way, 64, 12)), method, rows={"^0$": [(8, 16)]})


def test_a_base_that_is_decompressed_later_stays_adapted():
    x = torch.randn(3, IN)
    model = nn.Sequential(base("compressed"))
    before = model(x)
    perturb(inject(model, "bone", adapter="a"))
    expected = model(x)
    decompress(model[0])  # what compressed-tensors does before the first forward
    close(model(x), expected)
    perturb(inject(model, "bone", adapter="b"))
    disha.remove_adapters(model, "a")
    disha.set_active_adapters(model, "b")
    delta = bone_delta(x, model[0].disha["b"].block, OUT)
    close(model(x), before + delta)
    with pytest.raises(MergeError, match="would not compute the same"):
        disha.merge_adapters(model, dense=True)
    assert type(disha.remove_adapters(model)[0]) is nn.Linear


def test_a_layer_that_works_in_groups_raises():
    model = inject(nn.Sequential(CpuFP8GroupedLinear(IN, OUT, n_groups=2)), "bone")
    with pytest.raises(RuntimeError, match="size of tensor"):
        model(torch.randn(3, 2, IN))


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_fp8_embedding(padding_idx):
    seed_torch(0)
    embedding = FP8Embedding(20, 16, padding_idx)
    embedding.weight.data.copy_(torch.randn(20, 16))
    embedding.weight_scale.data.fill_(0.25)
    indices = torch.arange(20).view(4, 5)
    before = embedding(indices)
    inject(embedding, "bone", target="^$")
    assert torch.equal(embedding(indices), before)
    perturb(embedding)
    block = embedding.disha["default"].block
    weight = torch.zeros(20, 16)  # for its shape
    delta = reference.layout_delta_weight(
        "bone", "index out", block, weight, padding_idx=padding_idx
    )
    close(embedding(indices), before + delta[indices])


class Masked(nn.Linear):
    """Dense, with a mask of integers."""

    def __init__(self, dtype: torch.dtype = torch.int8) -> None:
        super().__init__(8, 16)
        self.register_buffer("mask", torch.ones(16, 8, dtype=dtype))

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)


class MaskedKernel(nn.Module):
    """The same with a weight of another name."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 8, 16
        self.kernel = nn.Parameter(torch.randn(16, 8))
        self.register_buffer("mask", torch.ones(16, 8, dtype=torch.int32))


class Window(nn.Module):
    """A block with sizes and an index, as windows of attention have."""

    def __init__(self, size: object = 8) -> None:
        super().__init__()
        self.in_features = self.out_features = size
        self.register_buffer("index", torch.zeros(64, 64, dtype=torch.int64))
        self.register_buffer("allowed", torch.ones(64, 64, dtype=torch.bool))
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        return self.proj(x)


@pytest.mark.parametrize(
    "make",
    [
        Masked,
        MaskedKernel,
        lambda: Masked(torch.int64),
        lambda: nn.utils.parametrizations.weight_norm(Masked()),
        Window,
        lambda: nn.Linear(8, 16),
        lambda: nn.LazyLinear(16),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 16)),
        lambda: prune.random_unstructured(nn.Linear(8, 16), "weight", 0.5),
        lambda: nn.Embedding(8, 16),
        lambda: nn.Conv1d(8, 16, 3),
        lambda: nn.BatchNorm1d(8),
        lambda: nn.MultiheadAttention(8, 2),
        lambda: nn.LSTM(8, 8),
    ],
)
def test_dense_modules_are_not_quantized(make):
    assert [
        quantized_weight(module) for module in make().modules() if quantized_weight(module)
    ] == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: MetalLinear(256, 32),
        lambda: HiggsLinear(256, 32, 2, dtype=torch.float16),
        lambda: FbgemmFp8Linear(256, 32, True),
        lambda: GgufLinear(256, 32, 2),
        lambda: FP8Linear(256, 32),
        lambda: FP8Linear(256, 32, block_size=(16, 16)),
        lambda: QuantizedLinear(256, 32, num_bits=8),
        lambda: Linear4bit(256, 32),
        lambda: Linear8bitLt(256, 32, has_fp16_weights=False),
    ],
)
def test_packed_modules_of_libraries_are_recognized(make):
    layer = make()
    slot = quantized_weight(layer)
    assert (slot.shape, slot.layout.pattern, slot.quantized) == ((32, 256), "out in", True)
    inject(layer, "bone")
    assert layer.disha["default"].block.shape == (4, 32)
    disha.remove_adapters(layer)
    assert quantized_weight(layer) == slot


def test_no_quantization_library_is_imported():
    code = """
import json, sys
import torch
from torch import nn
import disha
model = nn.Sequential(nn.Linear(8, 8))
disha.inject_adapters(model, "all-linear", 2, method="bat")
model(torch.ones(1, 8)).sum().backward()
disha.merge_adapters(model, dense=True)
print(json.dumps(sorted({"bitsandbytes", "torchao"} & set(sys.modules))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def int4_aware(step):
    return QATConfig(
        Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=PerGroup(32)
        ),
        step=step,
    )


@pytest.mark.parametrize("method", reference.METHODS)
def test_adapters_train_what_quantisation_will_round(method):
    """Fake quantisation rounds W and the update together, as `convert` does after merging."""
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    quantize_(model, int4_aware("prepare"))
    perturb(inject(model, method), size=0.1)
    x = torch.randn(3, 32)
    assert disha.check_adapters(model, x).ok
    expected = model(x)
    disha.merge_adapters(model, unload=True)
    torch.testing.assert_close(model(x), expected)
    quantize_(model, int4_aware("convert"))
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.05)


def test_a_model_is_prepared_before_its_adapters_are_injected():
    model = nn.Sequential(nn.Linear(32, 32))
    disha.inject_adapters(model, "0", 2)
    with pytest.raises(TypeError, match=r"cannot assign .* as parameter 'weight'"):  # torch's
        quantize_(model, int4_aware("prepare"))
    assert model[0].disha.active == ("default",)


def prepare_qat(model):
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    return torch.ao.quantization.prepare_qat(model.train())


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning")
@pytest.mark.parametrize(
    "quantize",
    [lambda model: torch.ao.quantization.quantize_dynamic(model, {nn.Linear}), prepare_qat],
    ids=["quantize_dynamic", "prepare_qat"],
)
def test_that_torch_leaves_adapted_layers_out_is_said(quantize):
    model = perturb(disha.inject_adapters(nn.Sequential(nn.Linear(8, 4)), "0", 2))
    x = torch.randn(3, 8)
    expected = model(x)
    with pytest.warns(UserWarning, match=r"leaves adapted layers in floating point.*unload=True"):
        model = quantize(model)
    assert torch.equal(model(x), expected)
