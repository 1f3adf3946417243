"""Every layer kind x method x dtype, held against the plain layer with the oracle's weight."""

import ast
import copy
from functools import partial

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import disha
from disha import ArgumentError, ArgumentTypeError, TargetError
from disha.functional import method_names
from disha.layers.kinds import LAYER_KINDS
from tests.conftest import InOut, Made, perturb, pickled, refused, seed_torch
from tests.every_pair import (
    Case,
    DtypeTests,
    PairTests,
    close,
    indices,
    numbers,
    one_kind_each,
)
from tests.reference import GROUPS, METHODS

BONE = ("bone", "tile", *GROUPS)
NO_SAMPLES = "needs samples along the leading dimension"


def conv(cls, *arguments, shape, samples=True, output_size=None, **options):
    def call(module, x):
        return module(x) if output_size is None else module(x, output_size=output_size)

    return Case(
        lambda: cls(*arguments, **options),
        numbers(*shape),
        kinds=BONE,
        call=call,
        routing_error=None if samples else NO_SAMPLES,
    )


C1, C2, C3 = nn.Conv1d, nn.Conv2d, nn.Conv3d
T1, T2, T3 = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d

CASES = {
    "linear": Case(lambda: nn.Linear(5, 6), numbers(3, 4, 5)),
    "linear, no bias": Case(
        lambda: nn.Linear(4, 4, bias=False), numbers(4), routing_error=NO_SAMPLES
    ),
    "transposed linear": Case(lambda: Conv1D(6, 5), numbers(3, 4, 5)),
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
        T2, 3, 4, 3, stride=2, shape=(2, 3, 4, 4), output_size=[10, 9]
    ),
    "conv transpose 3d": conv(T3, 3, 2, 2, shape=(2, 3, 3, 2, 2)),
    "embedding": Case(lambda: nn.Embedding(7, 4), indices(7, 3, 5), kinds=BONE),
    "embedding, padding": Case(
        lambda: nn.Embedding(7, 4, padding_idx=3), indices(7, 3, 5), kinds=BONE
    ),
    "embedding, last row padding": Case(
        lambda: nn.Embedding(7, 4, padding_idx=-1), indices(7, 9), kinds=BONE
    ),
}
"""Layers whose merged weight is that of the plain layer; those with max_norm have tests apart."""

PAIRS = one_kind_each(CASES)
"""Every layer once; `tests/layers/test_layouts.py` has every kind and dtype for every layout."""


@pytest.mark.parametrize("dtype", [torch.float64])
@pytest.mark.parametrize(("name", "kind"), PAIRS)
class TestEveryKind(DtypeTests):
    table = CASES


@pytest.mark.parametrize(("name", "kind"), PAIRS)
class TestEveryKindInFloat64(PairTests):
    table = CASES


ONE_OF_EACH = ("linear", "conv2d", "conv transpose 1d", "embedding, padding")


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in ONE_OF_EACH for kind in CASES[name].kinds]
)
def test_dropout_acts_in_training_only_and_is_unbiased(name, kind):
    case = CASES[name]
    plain, layer = case.adapted(kind), case.adapted(kind, dropout=0.5)
    for model in (plain, layer):
        perturb(model)
    x = case.input()
    expected = case.output(plain, x)
    assert torch.equal(case.output(layer.eval(), x), expected)
    base = case.output(case.plain(), x)
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
        seed_torch(0)
        layer = nn.Embedding(7, 4, max_norm=1.0, **options).double()
        return perturb(disha.inject_adapters(layer, "^$", 2), size=1.0)

    def test_the_sum_is_limited_and_the_weight_stays(self):
        layer, x = self.adapted(), torch.arange(7)
        before = layer.base_weight.detach().clone()
        output = layer(x)
        assert torch.equal(layer.base_weight, before)
        assert (output.norm(dim=-1) <= 1 + 1e-6).all()
        dense = before + layer.delta_weight(layer.disha["default"])
        close(output, nn.functional.embedding(x, dense.detach(), max_norm=1.0))

    def test_merged_is_unmerged_and_comes_back_bit_for_bit(self):
        layer, x = self.adapted(padding_idx=2), torch.arange(7)
        original, expected = layer.base_weight.detach().clone(), layer(x)
        disha.merge_adapters(layer)
        close(layer(x), expected)
        disha.unmerge_adapters(layer)
        assert torch.equal(layer.base_weight, original)


def test_sparse_gradients_of_an_embedding_stay_sparse():
    layer = disha.inject_adapters(nn.Embedding(7, 4, sparse=True), "^$", 2, freeze=False)
    layer(torch.tensor([1, 5])).sum().backward()
    assert layer.weight.grad.is_sparse
    assert layer.disha["default"].block.grad.abs().sum() > 0


@pytest.mark.parametrize("make", [nn.Embedding, partial(nn.EmbeddingBag, mode="sum")])
def test_resetting_a_table_keeps_its_padding_zero(make):
    layer = disha.inject_adapters(make(7, 4, padding_idx=2), "^$", 2, init="kaiming")
    before = layer.base_weight.detach().clone()
    layer.reset_parameters()
    assert not layer.base_weight[2].any()
    assert layer.base_weight[[0, 1, 3, 4, 5, 6]].ne(before[[0, 1, 3, 4, 5, 6]]).any(dim=1).all()


@pytest.mark.parametrize("method", METHODS)
def test_gradients_that_are_scaled_by_frequency(method):
    layer = nn.Embedding(7, 4, scale_grad_by_freq=True).double()
    perturb(disha.inject_adapters(layer, "^$", 2, method=method))
    block = layer.disha["default"].block
    x, cotangent = torch.tensor([1, 1, 1, 3, 2]), torch.randn(5, 4).double()
    (layer(x) * cotangent).sum().backward()
    dense = layer.base_weight + layer.delta_weight(layer.disha["default"])
    exact = nn.functional.embedding(x, dense, scale_grad_by_freq=True)
    close(block.grad, torch.autograd.grad((exact * cotangent).sum(), block)[0])


@pytest.mark.parametrize("make", [nn.Embedding, partial(nn.EmbeddingBag, mode="sum")])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("freeze", [True, False])
def test_layers_that_ask_for_sparse_gradients_train(make, method, freeze):
    layer, exact = (make(7, 4, sparse=sparse) for sparse in (True, False))
    exact.load_state_dict(layer.state_dict())
    for one in (layer, exact):
        perturb(disha.inject_adapters(one, "^$", 2, method=method, freeze=freeze))
        one(torch.tensor([[1, 5]])).square().sum().backward()
    for found, expected in zip(layer.parameters(), exact.parameters(), strict=True):
        assert (found.grad is None) == (expected.grad is None)
        if expected.grad is not None:
            close(found.grad.to_dense(), expected.grad)


class DoublingConv(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


class ClampedEmbedding(nn.Embedding):
    def forward(self, input):
        return super().forward(input.clamp(max=self.num_embeddings - 1))


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: DoublingConv(3, 4, 3), numbers(2, 3, 5, 5).float()),
        (lambda: ClampedEmbedding(6, 4), torch.tensor([[1, 9]])),
    ],
)
def test_a_subclass_keeps_its_own_forward(make, x):
    layer = make()
    plain = copy.deepcopy(layer)
    perturb(disha.inject_adapters(layer, "^$", 2))
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
    def test_only_layers_that_can_not_be_adapted(self):
        model = nn.Sequential(nn.LayerNorm(4), Gain(4))
        with refused(model, TargetError, r"0: .*LayerNorm.*1: .*Gain"):
            disha.inject_adapters(model, ".", 2)

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
        with refused(model, ArgumentError, f"0: .*{says}"):
            disha.inject_adapters(model, "0", **options)


class Gain(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return x * self.weight


class TestRegistry:
    @pytest.fixture(autouse=True)
    def _restored(self, monkeypatch):
        monkeypatch.setattr("disha.layers.kinds.LAYER_KINDS", dict(LAYER_KINDS))

    @pytest.mark.parametrize("method", METHODS)
    def test_a_made_up_layer_lives_a_whole_life(self, method, tmp_path):
        disha.register_layer_kind(InOut, {"weight": "in out"})
        model, x = nn.Sequential(InOut(5, 6), nn.ReLU()).double(), torch.randn(3, 5).double()
        before = model(x)
        for adapter in ("first", "default"):
            disha.inject_adapters(model, "all-linear", 2, method=method, adapter=adapter)
        assert torch.equal(model(x), before)
        perturb(model)
        dense = model[0].base_weight + model[0].delta_weight(model[0].disha["default"])
        close(model(x), torch.relu(x @ dense).detach())
        disha.save_adapter(model, tmp_path / "a")
        fresh = copy.deepcopy(model)
        disha.remove_adapters(fresh)
        disha.load_adapter(fresh, tmp_path / "a")
        assert torch.equal(fresh(x), model(x))
        assert torch.equal(pickled(model)(x), model(x))
        expected = model(x)
        disha.merge_adapters(model)
        close(model(x), expected)
        disha.unmerge_adapters(model)
        disha.remove_adapters(model)
        assert type(model[0]) is InOut
        assert torch.equal(model(x), before)

    @pytest.mark.parametrize(
        ("cls", "layouts", "says"),
        [
            (Gain(3), {"weight": "out in"}, "must be a class of nn.Modules"),
            (dict, {"weight": "out in"}, "must be a class of nn.Modules"),
            (Gain, None, "must be a dict of parameter name -> layout"),
            (Gain, {1: "out in"}, "must be a dict of parameter name -> layout"),
            (Gain, {"weight": 3}, "a layout must be a str"),
            (Gain, {"weight": "in out heads"}, "unknown layout 'in out heads'; allowed are 'out"),
        ],
    )
    def test_what_breaks_the_protocol_is_refused(self, cls, layouts, says):
        with pytest.raises(disha.DishaError, match=says):
            disha.register_layer_kind(cls, layouts)

    def test_a_layout_that_does_not_fit_the_weight(self):
        disha.register_layer_kind(Gain, {"weight": "out in"})
        model = nn.Sequential(Gain(6))
        with refused(model, TargetError, r"shape \(6,\) does not have the axes 'out in'"):
            disha.inject_adapters(model, "0", 2)


class Raw(nn.Module):
    """Has parameters whose layouts nothing declares."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(3, 6, 4))
        self.proj = nn.Linear(4, 4)

    def forward(self, x):
        return torch.einsum("ni,eoi->no", self.proj(x), self.mix)


def test_parameters_that_are_named_like_methods_of_a_dict(tmp_path):
    layouts = {"keys": "out in", "values": "in out"}
    parts = {
        name: nn.Parameter(torch.randn(6, size)) for name, size in zip(layouts, (8, 4), strict=True)
    }
    memory = Made(lambda self, x: (x @ self.keys.T).softmax(-1) @ self.values, **parts)
    model, x = nn.Sequential(memory).double(), torch.randn(3, 8).double()
    fresh = copy.deepcopy(model)
    perturb(disha.inject_adapters(model, "0", 2, layouts=layouts))
    blocks = model[0].disha["default"]
    assert [tuple(blocks[name].block.shape) for name in layouts] == [(2, 6), (2, 4)]
    assert disha.check_adapters(model, x).ok
    disha.save_adapter(model, tmp_path / "a")
    disha.load_adapter(fresh, tmp_path / "a")
    assert torch.equal(fresh(x), model(x))
    fresh.load_state_dict(model.state_dict())
    disha.merge_adapters(fresh)
    close(fresh(x), model(x))


class Known(nn.Module):
    """Three matrices of unknown layout, beside layers whose names or parameters are like them."""

    def __init__(self):
        super().__init__()
        self.t, self.w, self.mix = (nn.Parameter(torch.randn(4, 4)) for _ in range(3))
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Conv1d(4, 4, 3), nn.GRU(4, 8)])
        self.table = nn.Embedding(5, 4, padding_idx=0)
        self.attention = nn.MultiheadAttention(4, 1)
        self.mixer, self.qkv = nn.Linear(4, 4), nn.Linear(4, 4)


class TestLayoutsOfTheUser:
    def test_a_target_that_matches_only_them_says_what_to_write(self):
        model = Raw()
        with refused(model, TargetError, r"mix: .*unknown.*layouts=\{'\^mix\$': 'expert out in'"):
            disha.inject_adapters(model, "mix", 2)

    def test_a_target_that_matches_some_of_them_warns_once(self):
        with pytest.warns(
            UserWarning, match="1 weight that can't be adapted: mix: the layout"
        ) as w:
            disha.inject_adapters(Raw(), ".", 2)
        assert len(w) == 1
        assert w[0].filename == __file__

    @pytest.mark.filterwarnings("error")
    def test_a_warning_that_is_made_an_error_leaves_the_model_as_it_was(self):
        model = nn.ModuleList(Raw() for _ in range(6))
        says = r"selects 6 weights that can't be .*: 0\.mix: .*; 4\.mix: .*; and 1 more\. To leave"
        with refused(model, UserWarning, says):
            disha.inject_adapters(model, ".", 2)

    def test_declared_they_are_adapted(self):
        model, x = Raw().double(), torch.randn(3, 4).double()
        perturb(disha.inject_adapters(model, ".", 2, layouts={"mix": "expert out in"}))
        assert [one.name for one in disha.summary(model).layers] == ["mix", "proj"]
        report = disha.check_adapters(model, x)
        assert report.ok, str(report)

    @pytest.mark.parametrize("key", ["t$", "^t$", "w", "mix", "mix|t|w", r"^[a-z_0-9.]*$"], ids=str)
    def test_a_key_gives_a_layout_only_to_weights_that_have_none(self, key):
        def slots_of(model, **options):
            plan = disha.plan_adapters(model, ".", 2, exclude="^(t|w|mix)$", **options)
            return {layer.name: layer.layout for layer in plan.layers}

        assert slots_of(Known(), layouts={key: "in out"}) == slots_of(Known())
        plan = disha.plan_adapters(Known(), "^(t|w|mix)$", 2, layouts={key: "in out"})
        assert {layer.layout.pattern for layer in plan.layers} == {"in out"}

    def test_the_proposal_of_a_plan_does_what_it_says(self):
        proposals = [layer.remedy for layer in disha.plan_adapters(Known(), ".", 2).unknown]
        assert proposals == [f"layouts={{'^{name}$': 'out in'}}" for name in ("t", "w", "mix")]
        layouts = {}
        for proposal in proposals:
            layouts |= ast.literal_eval(proposal.removeprefix("layouts="))
        plan = disha.plan_adapters(Known(), "^(t|w|mix)$", 2, layouts=layouts)
        assert [layer.name for layer in plan.layers] == ["t", "w", "mix"]

    @pytest.mark.filterwarnings("ignore:.*other base")
    def test_a_known_layout_changes_by_the_whole_name(self, tmp_path):
        """Also in a model that loads the file."""
        layouts = {"mixer": "in out", "attention.in_proj_weight": "out in"}
        given = layouts | {r"^qkv\.weight$": "in out"}
        model = disha.inject_adapters(Known(), "mixer|in_proj|qkv", 2, layouts=given)
        disha.save_adapter(perturb(model), tmp_path / "file")
        found = disha.inspect_adapter(tmp_path / "file").layers
        assert {one.name: one.layout.pattern for one in found} == layouts | {"qkv": "in out"}
        assert len(disha.load_adapter(Known(), tmp_path / "file").matched) == 3

    def test_a_key_of_known_layouts_alone_says_how_to_change_one(self):
        says = r"layouts 'ixe' matches only .*mixer.weight; .*layouts=\{'mixer.weight': "
        with refused(Known(), ArgumentError, says):
            disha.inject_adapters(Known(), "mixer", 2, layouts={"ixe": "in out"})
        disha.inject_adapters(Known(), "mixer", 2, layouts={"ixe": "out in"})  # it is so

    @pytest.mark.parametrize(
        ("options", "kind", "says"),
        [
            (
                {"layouts": {"mix": "out width"}},
                ArgumentError,
                "unknown layout 'out width'; allowed",
            ),
            ({"layouts": {"mix": "out in"}}, ArgumentError, r"does not fit mix.*\(3, 6, 4\)"),
            (
                {"layouts": {"nothing": "out in"}},
                ArgumentError,
                "layouts 'nothing' matches nothing",
            ),
            ({"layouts": ["mix"]}, ArgumentTypeError, "layouts must be a dict"),
            ({"rows": {"proj": [(0, 9)]}}, TargetError, r"rows \(0, 9\) are out of range.*4"),
            ({"rows": {"proj": [(0, 2), (1, 3)]}}, ArgumentError, "each once"),
            ({"rows": {"proj": [(2, 2)]}}, ArgumentError, "0 <= first < stop"),
            ({"rows": {"proj": [(-1, 2)]}}, ArgumentError, "0 <= first < stop"),
            ({"rows": {"proj": []}}, ArgumentError, "0 <= first < stop"),
            ({"rows": {"proj": [(0, 1.5)]}}, ArgumentTypeError, "must be pairs"),
            ({"rows": {"proj": [0, 1, 2]}}, ArgumentTypeError, "must be pairs"),
            ({"rows": {"other": [(0, 2)]}}, ArgumentError, "rows 'other' matches nothing"),
            (
                {"method": "loha"},
                ArgumentError,
                f"unknown method 'loha'; allowed are {method_names()}",
            ),
        ],
    )
    def test_bad_input_changes_nothing(self, options, kind, says):
        model = Raw()
        with refused(model, kind, says):
            disha.inject_adapters(model, "proj", 2, **options)

    def test_q_and_v_of_a_fused_qkv(self):
        model, x = nn.Sequential(nn.Linear(6, 18)).double(), torch.randn(5, 6).double()
        base = model(x)
        perturb(disha.inject_adapters(model, "0", 3, rows={"^0$": [(12, 18), (0, 6)]}))
        q, k, v = (model(x) - base).split(6, -1)
        assert q.abs().min() > 0
        assert not k.any()
        assert v.abs().min() > 0
        assert disha.adapter_parameters(model)[0].shape == (3, 12)


@pytest.mark.parametrize("r", [1, 2, 3])
def test_a_transposed_convolution_may_have_more_groups_than_its_layout(r):
    """Then dW is computed, as merging does."""
    model = nn.Sequential(nn.ConvTranspose1d(4, 6, 5, groups=2).double())
    perturb(disha.inject_adapters(model, "0", r, layouts={"0": "in out *kernel"}))
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    unmerged = model(x)
    disha.merge_adapters(model)
    torch.testing.assert_close(model(x), unmerged)
