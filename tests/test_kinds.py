"""Every layer kind x method x dtype, held against the plain layer with the oracle's weight."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import disha
from disha import ArgumentError, ArgumentTypeError, TargetError
from disha.layers import LAYER_KINDS, AdaptedTransposedLinear
from tests import reference
from tests.conftest import assert_unchanged, perturb, snapshot


@dataclass(frozen=True)
class Case:
    """A layer, an input for it, and its update by the oracle.

    `samples` says whether the leading dimension of the input counts samples.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    delta: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    r: int = 2
    r_out: int = 2
    indices: int = 0
    methods: tuple[str, ...] = ("bone", "tile")
    samples: bool = True
    call: dict[str, Any] = field(default_factory=dict)

    def layer(self, dtype=torch.float64):
        torch.manual_seed(0)
        return self.make().to(dtype)

    def input(self, dtype=torch.float64):
        generator = torch.Generator().manual_seed(1)
        if self.indices:
            return torch.randint(self.indices, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator, dtype=torch.float64).to(dtype)

    def adapted(self, method, dtype=torch.float64, **options):
        layer = self.layer(dtype)
        kind, r_out = ("bone", self.r_out) if method == "tile" else (method, None)
        disha.inject_adapters(layer, "^$", self.r, method=kind, r_out=r_out, **options)
        return layer

    def output(self, layer, x):
        return layer(x, **self.call)


def linear_delta(layer, block):
    if block.dim() == 3:
        return reference.bat_delta_weight(layer.weight, block)
    return reference.bone_delta_weight(block, layer.in_features, layer.out_features)


def transposed_delta(layer, block):
    if block.dim() == 3:
        return reference.bat_delta_weight(layer.weight.T, block).T
    return reference.bone_delta_weight(block, *layer.weight.shape).T


def conv_delta(layer, block):
    return reference.conv_delta_weight(block, layer.in_channels // layer.groups, layer.out_channels)


def conv_transpose_delta(layer, block):
    groups = layer.groups
    return reference.conv_transpose_delta_weight(
        block, layer.in_channels // groups, layer.out_channels // groups, groups
    )


def embedding_delta(layer, block):
    return reference.embedding_delta_weight(
        block, layer.num_embeddings, layer.embedding_dim, layer.padding_idx
    )


def conv(cls, *arguments, shape, call=None, samples=True, **options):
    transposed = cls.__name__.startswith("ConvTranspose")
    return Case(
        lambda: cls(*arguments, **options),
        shape,
        conv_transpose_delta if transposed else conv_delta,
        samples=samples,
        call=call or {},
    )


C1, C2, C3 = nn.Conv1d, nn.Conv2d, nn.Conv3d
T1, T2, T3 = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
EVERY = ("bone", "tile", "bat")

CASES = {
    "linear": Case(lambda: nn.Linear(5, 6), (3, 4, 5), linear_delta, methods=EVERY),
    "linear, no bias": Case(
        lambda: nn.Linear(4, 4, bias=False), (4,), linear_delta, methods=EVERY, samples=False
    ),
    "transposed linear": Case(lambda: Conv1D(6, 5), (3, 4, 5), transposed_delta, methods=EVERY),
    "conv1d": conv(C1, 5, 4, 3, shape=(2, 5, 9)),
    "conv1d, stride, dilation": conv(C1, 4, 6, 2, stride=2, dilation=3, shape=(2, 4, 12)),
    "conv1d, no batch": conv(C1, 5, 4, 3, shape=(5, 9), samples=False),
    "conv2d": conv(C2, 3, 4, (3, 2), padding=(1, 0), shape=(2, 3, 6, 5)),
    "conv2d, same": conv(C2, 3, 4, 3, padding="same", bias=False, shape=(2, 3, 6, 5)),
    "conv2d, groups": conv(C2, 6, 4, 3, groups=2, shape=(2, 6, 5, 5)),
    "conv2d, reflect": conv(C2, 3, 4, 3, padding=1, padding_mode="reflect", shape=(2, 3, 5, 5)),
    "conv2d, replicate": conv(C2, 3, 4, 3, padding=1, padding_mode="replicate", shape=(2, 3, 5, 5)),
    "conv2d, circular": conv(C2, 3, 4, 3, padding=2, padding_mode="circular", shape=(2, 3, 5, 5)),
    "conv3d": conv(C3, 3, 2, 2, shape=(2, 3, 4, 3, 3)),
    "conv transpose 1d": conv(T1, 5, 4, 3, stride=2, padding=1, shape=(2, 5, 6)),
    "conv transpose 1d, groups": conv(T1, 6, 8, 3, groups=2, shape=(2, 6, 6)),
    "conv transpose 2d": conv(
        T2, 3, 4, 3, stride=2, output_padding=1, dilation=2, shape=(2, 3, 4, 4)
    ),
    "conv transpose 2d, output size": conv(
        T2, 3, 4, 3, stride=2, shape=(2, 3, 4, 4), call={"output_size": [10, 9]}
    ),
    "conv transpose 3d": conv(T3, 3, 2, 2, shape=(2, 3, 3, 2, 2)),
    "embedding": Case(lambda: nn.Embedding(7, 4), (3, 5), embedding_delta, indices=7),
    "embedding, padding": Case(
        lambda: nn.Embedding(7, 4, padding_idx=3), (3, 5), embedding_delta, indices=7
    ),
    "embedding, last row padding": Case(
        lambda: nn.Embedding(7, 4, padding_idx=-1), (9,), embedding_delta, indices=7
    ),
}
"""Layers whose merged weight is that of the plain layer; those with max_norm have tests apart."""

PAIRS = [(name, method) for name, case in CASES.items() for method in case.methods]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def tolerance(dtype):
    return {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.06}[dtype]


def close(actual, expected, dtype=torch.float64):
    assert actual.dtype == expected.dtype == dtype
    limit = tolerance(dtype) * max(1.0, float(expected.detach().abs().max()))
    assert (actual - expected).abs().max() <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "method"), PAIRS)
class TestEveryKind:
    def test_injection_changes_no_bit(self, name, method, dtype):
        case = CASES[name]
        x = case.input(dtype)
        before = case.output(case.layer(dtype), x)
        assert torch.equal(case.output(case.adapted(method, dtype), x), before)

    def test_forward_is_that_of_the_dense_merged_weight(self, name, method, dtype):
        case = CASES[name]
        layer, plain, x = (
            case.adapted(method, dtype, scale=0.5),
            case.layer(dtype),
            case.input(dtype),
        )
        perturb(layer)
        with torch.no_grad():
            block = next(disha.adapter_parameters(layer)).to(torch.float64)
            delta = case.delta(plain.to(torch.float64), block)
            plain.weight.add_(delta * 0.5)
        expected = case.output(plain, x if case.indices else x.double())
        close(case.output(layer, x), expected.to(dtype), dtype)

    def test_merged_is_unmerged_and_comes_back_bit_for_bit(self, name, method, dtype):
        case = CASES[name]
        layer, x = case.adapted(method, dtype), case.input(dtype)
        perturb(layer)
        original, expected = layer.weight.detach().clone(), case.output(layer, x)
        for _ in range(100):
            disha.merge_adapters(layer)
            merged = case.output(layer, x)
            disha.unmerge_adapters(layer)
        close(merged, expected, dtype)
        assert not torch.equal(merged, case.output(case.layer(dtype), x))
        assert torch.equal(layer.weight, original)
        assert torch.equal(case.output(layer, x), expected)

    def test_file_round_trip_gives_equal_outputs(self, name, method, dtype, tmp_path):
        case = CASES[name]
        layer, x = case.adapted(method, dtype), case.input(dtype)
        perturb(layer)
        disha.save_adapter(layer, tmp_path / "a")
        fresh = case.layer(dtype)
        disha.load_adapter(fresh, tmp_path / "a")
        assert torch.equal(case.output(fresh, x), case.output(layer, x))

    def test_removal_restores(self, name, method, dtype):
        layer = CASES[name].layer(dtype)
        before = snapshot(layer)
        disha.inject_adapters(layer, "^$", 2, method=method.replace("tile", "bone"))
        disha.remove_adapters(layer)
        assert_unchanged(layer, before)


@pytest.mark.parametrize(("name", "method"), PAIRS)
class TestEveryKindInFloat64:
    def test_gradients_are_those_of_the_dense_merged_weight(self, name, method):
        case = CASES[name]
        layer, plain, x = case.adapted(method), case.layer(), case.input()
        perturb(layer)
        x.requires_grad_(not case.indices)
        block = next(disha.adapter_parameters(layer))
        leaf = block.detach().clone().requires_grad_()
        y = torch.randn_like(case.output(layer, x))
        inputs = [x] if x.requires_grad else []
        found = torch.autograd.grad((case.output(layer, x) * y).sum(), [block, *inputs])
        weight = plain.weight.detach() + case.delta(plain, leaf)
        output = torch.func.functional_call(plain, {"weight": weight}, (x,), case.call)
        expected = torch.autograd.grad((output * y).sum(), [leaf, *inputs])
        for got, wanted in zip(found, expected, strict=True):
            close(got, wanted)

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_compute_the_same(self, name, method, clone):
        case = CASES[name]
        layer = case.adapted(method)
        perturb(layer)
        assert torch.equal(
            case.output(clone(layer), case.input()), case.output(layer, case.input())
        )

    def test_several_adapters_add_up_and_switch_off(self, name, method):
        case = CASES[name]
        x = case.input()
        layer = case.adapted(method, adapter="a")
        disha.inject_adapters(layer, "^$", 1, adapter="b")
        perturb(layer)
        base = case.output(case.layer(), x)
        updates = {}
        for names in ("a", "b", ["a", "b"]):
            disha.set_active_adapters(layer, names)
            updates[str(names)] = case.output(layer, x) - base
        assert updates["a"].abs().max() > 0.01
        close(updates["['a', 'b']"], updates["a"] + updates["b"])
        with disha.adapters_disabled(layer):
            assert torch.equal(case.output(layer, x), base)

    def test_routing_equals_running_the_samples_one_by_one(self, name, method):
        case = CASES[name]
        layer, x = case.adapted(method, adapter="a"), case.input()
        disha.inject_adapters(layer, "^$", 1, adapter="b")
        perturb(layer)
        names = (["b", "a", None] * len(x))[: len(x)]
        if not case.samples:
            with (
                pytest.raises(ArgumentError, match="one sample per entry of the leading dimension"),
                disha.route_adapters(layer, names),
            ):
                case.output(layer, x)
            return
        with disha.route_adapters(layer, names):
            routed = case.output(layer, x)
        for adapter, sample, output in zip(names, x, routed, strict=True):
            disha.set_active_adapters(layer, [] if adapter is None else adapter)
            close(output, case.output(layer, sample[None])[0])

    def test_compiled_is_eager(self, name, method):
        case = CASES[name]
        layer, x = case.adapted(method), case.input()
        perturb(layer)
        torch._dynamo.reset()  # each case is another graph of the same code
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        close(case.output(compiled, x), case.output(layer, x))

    def test_dropout_acts_in_training_only_and_is_unbiased(self, name, method):
        case = CASES[name]
        plain, layer = case.adapted(method), case.adapted(method, dropout=0.5)
        for model in (plain, layer):
            perturb(model)
        x = case.input()
        expected = case.output(plain, x)
        assert torch.equal(case.output(layer.eval(), x), expected)
        base = case.output(case.layer(), x)
        layer.train()
        outputs = torch.stack([case.output(layer, x) for _ in range(400)])
        spread = outputs.std(dim=0)
        assert spread.max() > 0.01
        # six standard errors of a mean of 400
        assert ((outputs.mean(dim=0) - expected).abs() <= 0.3 * spread + 1e-10).all()
        assert not torch.equal(outputs[0], base)


class TestMaxNorm:
    """torch scales rows of the weight in place, also in evaluation; an adapter must not."""

    def adapted(self, **options):
        torch.manual_seed(0)
        layer = nn.Embedding(7, 4, max_norm=1.0, **options).double()
        disha.inject_adapters(layer, "^$", 2)
        perturb(layer, size=1.0)
        return layer

    def test_the_sum_is_limited_and_the_weight_stays(self):
        layer, x = self.adapted(), torch.arange(7)
        before = layer.weight.detach().clone()
        output = layer(x)
        assert torch.equal(layer.weight, before)
        assert (output.norm(dim=-1) <= 1 + 1e-6).all()
        dense = before + layer.delta_weight(layer.disha["default"])
        close(output, nn.functional.embedding(x, dense.detach(), max_norm=1.0))

    def test_merged_is_unmerged_and_comes_back_bit_for_bit(self):
        layer, x = self.adapted(padding_idx=2), torch.arange(7)
        original, expected = layer.weight.detach().clone(), layer(x)
        disha.merge_adapters(layer)
        close(layer(x), expected)
        disha.unmerge_adapters(layer)
        assert torch.equal(layer.weight, original)


def test_sparse_gradients_of_an_embedding_stay_sparse():
    layer = nn.Embedding(7, 4, sparse=True)
    disha.inject_adapters(layer, "^$", 2, freeze=False)
    layer(torch.tensor([1, 5])).sum().backward()
    assert layer.weight.grad.is_sparse
    assert layer.disha["default"].block.grad.abs().sum() > 0


class DoublingConv(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


class ClampedEmbedding(nn.Embedding):
    def forward(self, input):
        return super().forward(input.clamp(max=self.num_embeddings - 1))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (DoublingConv(3, 4, 3), torch.randn(2, 3, 5, 5)),
        (ClampedEmbedding(6, 4), torch.tensor([[1, 9]])),
    ],
)
def test_a_subclass_keeps_its_own_forward(layer, x):
    plain = copy.deepcopy(layer)
    disha.inject_adapters(layer, "^$", 2)
    perturb(layer)
    with torch.no_grad():
        plain.weight.add_(layer.delta_weight(layer.disha["default"]))
    assert torch.allclose(layer(x), plain(x), atol=1e-5)
    expected = layer(x)
    disha.merge_adapters(layer)
    assert torch.allclose(layer(x), expected, atol=1e-5)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.rnn = nn.LSTM(6, 6, batch_first=True)
        self.mix = nn.Bilinear(6, 6, 6)
        self.proj = Conv1D(4, 6)

    def forward(self, tokens):
        x = self.conv(self.embed(tokens).transpose(-1, -2)).transpose(-1, -2)
        x, _ = self.rnn(x)
        return self.proj(self.mix(x, x))


class TestWalking:
    def test_all_linear_takes_transposed_layers_and_no_others(self):
        plan = disha.plan_adapters(Mixed(), "all-linear", 2)
        assert [layer.name for layer in plan.layers] == ["proj"]

    def test_a_pattern_takes_every_kind_and_says_what_it_can_not_take(self):
        plan = disha.plan_adapters(Mixed(), ".", 2)
        assert [layer.name for layer in plan.layers] == ["embed", "conv", "proj"]
        assert {(s.name, s.reason) for s in plan.skipped} == {
            ("rnn", "no layer kind adapts LSTM"),
            ("mix", "no layer kind adapts Bilinear"),
        }

    def test_bat_leaves_out_what_is_not_linear(self):
        plan = disha.plan_adapters(Mixed(), "embed|conv|proj", 2, method="bat")
        assert [layer.name for layer in plan.layers] == ["proj"]
        assert {s.name: s.reason for s in plan.skipped} == {
            "embed": "'bat' does not adapt Embedding, 'bone' does",
            "conv": "'bat' does not adapt Conv1d, 'bone' does",
        }
        with pytest.raises(TargetError, match=r"conv \(Conv1d\): 'bat' does not adapt Conv1d"):
            disha.inject_adapters(Mixed(), "conv", 2, method="bat")

    def test_only_layers_that_can_not_be_adapted(self):
        model = Mixed()
        before = snapshot(model)
        with pytest.raises(TargetError, match=r"rnn \(LSTM\).*mix \(Bilinear\)"):
            disha.inject_adapters(model, "rnn|mix", 2)
        assert_unchanged(model, before)

    @pytest.mark.parametrize(
        ("layer", "options", "says"),
        [
            (nn.Conv2d(8, 4, 3, groups=4), {"r": 3}, "r=3 is larger than its 2 input channels"),
            (nn.Conv2d(4, 6, 3), {"r": 2, "r_out": 4}, "r_out=4 does not divide its 6 output"),
            (nn.ConvTranspose1d(4, 8, 3, groups=2), {"r": 3}, "its 2 input channels per group"),
            (nn.Embedding(5, 4), {"r": 6}, "r=6 is larger than num_embeddings=5"),
            (nn.Embedding(5, 4), {"r": 2, "r_out": 3}, "does not divide embedding_dim=4"),
        ],
    )
    def test_sizes_that_do_not_fit(self, layer, options, says):
        model = nn.Sequential(layer)
        before = snapshot(model)
        with pytest.raises(ArgumentError, match=f"0: .*{says}"):
            disha.inject_adapters(model, "0", **options)
        assert_unchanged(model, before)

    def test_lazy_layers_say_what_to_do(self):
        with pytest.raises(TargetError, match="run the model once"):
            disha.inject_adapters(nn.Sequential(nn.LazyConv2d(4, 3)), "0", 2)

    def test_a_tied_embedding_is_adapted_and_refuses_to_merge(self):
        model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
        model[1].weight = model[0].weight
        disha.inject_adapters(model, "^0$", 2, init="kaiming")
        before = snapshot(model)
        with pytest.raises(disha.MergeError, match=r"0.weight is shared with 1.weight"):
            disha.merge_adapters(model)
        assert_unchanged(model, before)

    def test_whole_model_trains_every_block(self):
        model = Mixed()
        disha.inject_adapters(model, ".", 2)
        optimizer = torch.optim.SGD(disha.adapter_parameters(model), lr=0.5)
        before = [block.detach().clone() for block in disha.adapter_parameters(model)]
        for _ in range(3):
            optimizer.zero_grad()
            (model(torch.arange(9)[None]) - 1).square().mean().backward()
            optimizer.step()
        for then, now in zip(before, disha.adapter_parameters(model), strict=True):
            assert not torch.equal(then, now)


class Gain(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return x * self.weight


class AdaptedGain(disha.AdaptedLayer):
    """dW[i] = D[i mod r]."""

    @classmethod
    def geometry(cls, module):
        return disha.Geometry(*module.weight.shape, *module.weight.shape)

    @classmethod
    def block_shape(cls, module, method, r, r_out):
        return (r,)

    def delta_weight(self, block):
        size = self.base_weight.shape[0]
        return block.block.repeat(-(-size // block.r))[:size]

    def delta_output(self, block, input):
        return block.dropped(input) * self.delta_weight(block) * block.current_scale()


class MyConv1D(nn.Module):
    """A transposed linear layer that disha has never heard of."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features))

    def forward(self, x):
        return x @ self.weight


class TestRegistry:
    @pytest.fixture(autouse=True)
    def _restored(self, monkeypatch):
        monkeypatch.setattr("disha.layers.registry.LAYER_KINDS", dict(LAYER_KINDS))

    def test_a_made_up_layer_lives_a_whole_life(self, tmp_path):
        disha.register_layer_kind(Gain, AdaptedGain)
        model, x = nn.Sequential(Gain(6), nn.ReLU()).double(), torch.rand(2, 6, dtype=torch.float64)
        before = model(x)
        disha.inject_adapters(model, "0", 4)
        assert torch.equal(model(x), before)
        perturb(model)
        block = model[0].disha["default"].block
        close(model(x), torch.relu(x * (1 + block.repeat(2)[:6])).detach())
        disha.save_adapter(model, tmp_path / "a")
        fresh = nn.Sequential(Gain(6), nn.ReLU()).double()
        disha.load_adapter(fresh, tmp_path / "a")
        assert torch.equal(fresh(x), model(x))
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
        expected = model(x)
        disha.merge_adapters(model)
        close(model(x), expected)
        disha.unmerge_adapters(model)
        disha.remove_adapters(model)
        assert type(model[0]) is Gain
        assert torch.equal(model(x), before)

    @pytest.mark.parametrize("size", [1, 6])
    def test_a_block_of_one_dimension_can_act_from_the_start(self, size):
        disha.register_layer_kind(Gain, AdaptedGain)
        model = disha.inject_adapters(nn.Sequential(Gain(6)).double(), "0", size, init="kaiming")
        block = model[0].disha["default"].block
        assert block.shape == (size,)
        assert block.all()
        assert block.abs().max() <= size**-0.5  # as one row of a linear layer's weight
        close(model(torch.ones(6, dtype=torch.float64)), 1 + block.repeat(6 // size).detach())

    def test_a_transposed_layer_of_the_users(self):
        disha.register_layer_kind(MyConv1D, AdaptedTransposedLinear)
        model = nn.Sequential(MyConv1D(5, 6))
        x = torch.randn(3, 5)
        disha.inject_adapters(model, "all-linear", 2, method="bat")
        perturb(model)
        dense = model[0].weight + transposed_delta(model[0], model[0].disha["default"].block)
        assert torch.allclose(model(x), x @ dense, atol=1e-5)

    def test_unregistered_it_is_refused(self):
        with pytest.raises(TargetError, match="no layer kind adapts Gain"):
            disha.inject_adapters(nn.Sequential(Gain(6)), "0", 2)

    @pytest.mark.parametrize(
        ("cls", "kind", "says"),
        [
            (Gain(3), AdaptedGain, "must be a class of nn.Modules"),
            (dict, AdaptedGain, "must be a class of nn.Modules"),
            (Gain, Gain, "must be a subclass of disha.AdaptedLayer"),
            (Gain, None, "must be a subclass of disha.AdaptedLayer"),
            (Gain, LAYER_KINDS[nn.Linear], "adapts subclasses of Linear, and Gain is none"),
            (
                Gain,
                type("Half", (disha.AdaptedLayer,), {"geometry": AdaptedGain.__dict__["geometry"]}),
                "Half is no complete.*declare block_shape, delta_weight, delta_output",
            ),
        ],
    )
    def test_what_breaks_the_protocol_is_refused(self, cls, kind, says):
        with pytest.raises(ArgumentTypeError, match=says):
            disha.register_layer_kind(cls, kind)

    def test_a_wrong_update_is_refused_at_merging(self):
        class Wrong(AdaptedGain):
            def delta_weight(self, block):
                return block.block

        disha.register_layer_kind(Gain, Wrong)
        model = disha.inject_adapters(nn.Sequential(Gain(6)), "0", 4)
        before = snapshot(model)
        with pytest.raises(disha.MergeError, match=r"shape \(4,\), not that of the weight, \(6,\)"):
            disha.merge_adapters(model)
        assert_unchanged(model, before)
