"""Every layout x method x dtype, held against dense weights that slow loops have computed.

One row for each layout, and for each way in which a module can have weights of it.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers.pytorch_utils import Conv1D

import disha
from disha import ArgumentError, ModeError
from disha.model import ModelView
from tests import reference
from tests.conftest import assert_unchanged, needs_fully_shard, perturb, snapshot


class Experts(nn.Module):
    """A stack of matrices; each token goes to one of them, or to all by a product of the stack."""

    def __init__(self, pattern: str, whole: bool) -> None:
        super().__init__()
        self.turned, self.whole = pattern == "expert in out", whole
        shape = (3, 8, 4) if self.turned else (3, 4, 8)
        self.mix = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        if self.whole:
            tokens = x.expand(3, *x.shape)
            weight = self.mix if self.turned else self.mix.transpose(1, 2)
            return torch.bmm(tokens, weight).sum(0)
        weights = [self.mix[e] for e in range(3)]
        if self.turned:
            return torch.cat([part @ w for part, w in zip(x.chunk(3), weights, strict=True)])
        return torch.cat([F.linear(part, w) for part, w in zip(x.chunk(3), weights, strict=True)])


class Raw(nn.Module):
    """Parameters of its own, used by einsum and by products."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Parameter(torch.randn(5, 8))
        self.out = nn.Parameter(torch.randn(4, 5))

    def forward(self, x):
        return torch.einsum("ni,oi->no", x @ self.into.mT, self.out)


@dataclass(frozen=True)
class Row:
    """A module with weights of some layout, and an input for it.

    `routes` is False where samples can't be routed.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    indices: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    methods: tuple[str, ...] = ("bone", "tile", "bat")
    routes: bool = True
    call: Callable[[nn.Module, torch.Tensor], Any] = lambda module, x: module(x)
    compiles: bool = True
    exports: bool = True

    def plain(self, dtype=torch.float64):
        torch.manual_seed(0)
        return nn.Sequential(self.make()).to(dtype)

    def adapted(self, method, dtype=torch.float64, **options):
        kind, r_out = ("bone", 2) if method == "tile" else (method, None)
        model = self.plain(dtype)
        own = {"target_regex": "^0", **self.options, **options}
        return disha.inject_adapters(model, r=2, method=kind, r_out=r_out, **own)

    def input(self, dtype=torch.float64):
        generator = torch.Generator().manual_seed(1)
        if self.indices:
            return torch.randint(self.indices, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator, dtype=torch.float64).to(dtype)

    def output(self, model, x):
        found = self.call(model[0], x)
        return found[0] if isinstance(found, tuple) else found


def attention(module, x):
    return module(x, x, x, need_weights=False)


EXPERTS = {"layouts": {"mix": "expert out in"}}
EXPERTS_TURNED = {"layouts": {"mix": "expert in out"}}
RAW = {"layouts": {"into": "out in", "out$": "out in"}, "target_regex": "into|out"}
ROWS = {"rows": {"^0$": [(4, 6), (0, 2)]}}

TABLE = {
    "out in": Row(lambda: nn.Linear(5, 6), (3, 4, 5)),
    "out in, raw": Row(Raw, (3, 8), options=RAW, methods=("bone", "bat"), routes=False),
    "out in, recurrent": Row(
        lambda: nn.LSTM(4, 6, 2, bidirectional=True, proj_size=4, batch_first=True),
        (3, 5, 4), routes=False, compiles=False, exports=False,
    ),
    "out in, gates": Row(
        lambda: nn.GRU(4, 6, bias=False, batch_first=True), (3, 5, 4), routes=False,
        compiles=False, exports=False,
    ),
    "out in, cell": Row(lambda: nn.LSTMCell(4, 6), (3, 4), routes=False),
    "in out": Row(lambda: Conv1D(6, 5), (3, 4, 5)),
    "index out": Row(lambda: nn.Embedding(7, 4), (3, 5), indices=7),
    "index out, padding": Row(lambda: nn.Embedding(7, 4, padding_idx=3), (3, 5), indices=7),
    "index out, bags": Row(
        lambda: nn.EmbeddingBag(7, 4, mode="sum"), (3, 5), indices=7, routes=False
    ),
    "out in *kernel": Row(lambda: nn.Conv1d(6, 4, 3, groups=2), (2, 6, 5)),
    "out in *kernel, 2": Row(
        lambda: nn.Conv2d(3, 4, (3, 2), padding=1, padding_mode="circular"), (2, 3, 5, 4)
    ),
    "in out *kernel": Row(lambda: nn.ConvTranspose2d(4, 8, 2, groups=2), (2, 4, 3, 3)),
    "expert out in": Row(
        lambda: Experts("expert out in", False), (6, 8), options=EXPERTS, routes=False
    ),
    "expert in out": Row(
        lambda: Experts("expert in out", False), (6, 8), options=EXPERTS_TURNED, routes=False
    ),
    "expert out in, whole": Row(
        lambda: Experts("expert out in", True), (6, 8), options=EXPERTS, routes=False
    ),
    "expert in out, whole": Row(
        lambda: Experts("expert in out", True), (6, 8), options=EXPERTS_TURNED, routes=False
    ),
    "expert out in, bilinear": Row(
        lambda: nn.Bilinear(6, 5, 4), (3, 5), routes=False, methods=("bone", "bat"),
        call=lambda module, x: module(torch.cat([x, x[:, :1]], 1), x),
    ),
    "rows": Row(lambda: nn.Linear(5, 6), (3, 4, 5), options=ROWS),
    "rows, in out": Row(lambda: Conv1D(6, 5), (3, 4, 5), options=ROWS),
    "rows, convolution": Row(lambda: nn.Conv1d(4, 6, 3), (3, 4, 5), options=ROWS),
    "rows, embedding": Row(lambda: nn.Embedding(7, 6), (3, 5), indices=7, options=ROWS),
    "rows, attention": Row(
        lambda: nn.MultiheadAttention(6, 2, batch_first=True), (3, 4, 6), call=attention
    ),
}  # fmt: skip
PAIRS = [(name, method) for name, row in TABLE.items() for method in row.methods]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LIMITS = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 0.08, torch.float16: 0.02}
every_pair = pytest.mark.parametrize(("name", "method"), PAIRS)


def close(actual, expected, dtype=torch.float64):
    assert actual.dtype == expected.dtype
    limit = LIMITS[dtype] * max(1.0, float(expected.detach().double().abs().max()))
    assert (actual.double() - expected.double()).abs().max() <= limit


def oracle(weight, block, slot):
    """Return dW by the loops of the reference, one matrix after the other."""
    layout, rows = slot.layout, slot.rows
    if rows:
        axis = {"out in": 0, "out in *kernel": 0}.get(layout.pattern, 1)
        chosen = torch.cat([torch.arange(*pair) for pair in rows])
        whole = copy.copy(slot)
        object.__setattr__(whole, "rows", ())
        part = oracle(weight.index_select(axis, chosen), block, whole)
        return torch.zeros_like(weight).index_add(axis, chosen, part)
    if layout.pattern == "out in":
        return matrix(weight, block)
    if layout.pattern == "in out":
        return matrix(weight.T, block).T
    if layout.pattern == "index out":
        delta = matrix(weight.T, block).T
        if layout.padding_idx is None:
            return delta
        keep = torch.ones(len(weight), 1, dtype=weight.dtype)
        keep[layout.padding_idx] = 0.0
        return delta * keep
    if layout.pattern == "expert out in":
        return torch.stack([matrix(w, d) for w, d in zip(weight, block, strict=True)])
    if layout.pattern == "expert in out":
        return torch.stack([matrix(w.T, d).T for w, d in zip(weight, block, strict=True)])
    return convolution(weight, block, layout)


def matrix(weight, block):
    if block.dim() == 3:
        return reference.bat_delta_weight(weight, block)
    return reference.bone_delta_weight(block, weight.shape[1], weight.shape[0])


def convolution(weight, block, layout):
    bat = weight.dim() != block.dim()
    if layout.pattern == "out in *kernel":
        if not bat:
            return reference.conv_delta_weight(block, weight.shape[1], weight.shape[0])
        parts = weight.flatten(2).unbind(-1)
        blocks = block.reshape(-1, *block.shape[-3:])
        deltas = [matrix(w, d) for w, d in zip(parts, blocks, strict=True)]
        return torch.stack(deltas, -1).view(weight.shape)
    inputs = weight.shape[0] // layout.groups
    if not bat:
        return reference.conv_transpose_delta_weight(block, inputs, weight.shape[1], layout.groups)
    groups = []
    for group, own in zip(weight.split(inputs), block, strict=True):
        parts = group.flatten(2).unbind(-1)
        blocks = own.reshape(-1, *own.shape[-3:])
        deltas = [matrix(w.T, d).T for w, d in zip(parts, blocks, strict=True)]
        groups.append(torch.stack(deltas, -1).view(group.shape))
    return torch.cat(groups)


def updates(adapted, adapter="default", blocks=None):
    """Return parameter name -> dW by the oracle, as far as blocks go in float64."""
    found = {}
    for name, weight in ModelView(adapted).weights:
        block = weight.blocks[adapter]
        values = block.block.detach().double() if blocks is None else blocks[name]
        module = next(n for n, m in adapted.named_modules() if m is weight.layer)
        key = f"{module}.{block.slot.parameter}"
        delta = oracle(weight.base.detach().double(), values, block.slot)
        found[key] = found[key] + delta if key in found else delta
    return found


def dense(row, adapted, scale=1.0, adapter="default"):
    """Return the plain model in float64 with the updates in its weights."""
    plain = row.plain(adapted[0].disha.blocks()[adapter, first(adapted)].block.dtype).double()
    with torch.no_grad():
        for key, delta in updates(adapted, adapter).items():
            plain.get_parameter(key).add_(delta * scale)
    return plain


def first(adapted):
    return next(name for _, name in adapted[0].disha.blocks())


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_pair
class TestEveryDtype:
    def test_injection_changes_no_bit(self, name, method, dtype):
        row = TABLE[name]
        x = row.input(dtype)
        expected = row.output(row.plain(dtype), x)
        output = row.output(row.adapted(method, dtype), x)
        if method == "bat" and ("rows" in name or "whole" in name):  # several products
            close(output, expected, dtype)
        else:
            assert torch.equal(output, expected)

    def test_forward_is_that_of_the_dense_weight(self, name, method, dtype):
        row = TABLE[name]
        model, x = row.adapted(method, dtype, scale=0.5), row.input(dtype)
        perturb(model)
        expected = row.output(dense(row, model, 0.5), x if row.indices else x.double())
        close(row.output(model, x), expected.to(dtype), dtype)

    def test_merged_is_unmerged_and_comes_back_bit_for_bit(self, name, method, dtype):
        row = TABLE[name]
        model, x = row.adapted(method, dtype), row.input(dtype)
        perturb(model)
        before, expected = snapshot(model), row.output(model, x)
        for _ in range(3):
            disha.merge_adapters(model)
            merged = row.output(model, x)
            disha.unmerge_adapters(model)
        close(merged, expected, dtype)
        assert not torch.equal(merged, row.output(row.plain(dtype), x))
        assert_unchanged(model, before)
        assert torch.equal(row.output(model, x), expected)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@every_pair
class TestEveryPair:
    def test_gradients_are_those_of_the_dense_weight(self, name, method):
        row = TABLE[name]
        model, plain, x = row.adapted(method), row.plain(), row.input()
        perturb(model)
        x.requires_grad_(not row.indices)
        weights = dict(ModelView(model).weights)
        own = {key: weight.blocks["default"].block for key, weight in weights.items()}
        leaves = {key: block.detach().clone().requires_grad_() for key, block in own.items()}
        y = torch.randn_like(row.output(model, x))
        inputs = [x] if x.requires_grad else []
        found = torch.autograd.grad((row.output(model, x) * y).sum(), [*own.values(), *inputs])
        state = {key: parameter.detach() for key, parameter in plain.named_parameters()}
        for key, delta in updates(model, blocks=leaves).items():
            state[key] = state[key] + delta

        class Whole(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = plain

            def forward(self, x):
                return row.output(self.model, x)

        named = {f"model.{key}": value for key, value in state.items()}
        if isinstance(plain[0], nn.RNNBase):  # torch's keeps a list of its weights
            for key, value in state.items():
                own_name = key.removeprefix("0.")
                plain[0]._parameters.pop(own_name)
                index = plain[0]._flat_weights_names.index(own_name)
                plain[0]._flat_weights[index] = value
            output = row.output(plain, x)
        else:
            output = torch.func.functional_call(Whole(), named, (x,))
        expected = torch.autograd.grad((output * y).sum(), [*leaves.values(), *inputs])
        for one, other in zip(found, expected, strict=True):
            close(one, other)

    def test_file_round_trip_gives_equal_outputs(self, name, method, tmp_path):
        row = TABLE[name]
        model, x = row.adapted(method), row.input()
        perturb(model)
        disha.save_adapter(model, tmp_path / "a")
        fresh = row.plain()
        disha.load_adapter(fresh, tmp_path / "a")
        assert torch.equal(row.output(fresh, x), row.output(model, x))

    def test_removal_restores(self, name, method):
        row = TABLE[name]
        model = row.plain()
        before = snapshot(model)
        disha.inject_adapters(model, **{"target_regex": "^0", **row.options}, r=1)
        disha.remove_adapters(model)
        assert_unchanged(model, before)

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_compute_the_same(self, name, method, clone):
        row = TABLE[name]
        model, x = row.adapted(method), row.input()
        perturb(model)
        assert torch.equal(row.output(clone(model), x), row.output(model, x))

    def test_several_adapters_add_up_and_switch_off(self, name, method):
        row = TABLE[name]
        x, model = row.input(), row.adapted(method, adapter="a")
        own = {"target_regex": "^0", **row.options}
        disha.inject_adapters(model, r=1, adapter="b", **own)
        perturb(model)
        plain = row.plain()
        with torch.no_grad():
            for adapter in "ab":
                for key, delta in updates(model, adapter).items():
                    plain.get_parameter(key).add_(delta)
        disha.set_active_adapters(model, ["b", "a"])
        close(row.output(model, x), row.output(plain, x))
        with disha.adapters_disabled(model):
            close(row.output(model, x), row.output(row.plain(), x))

    def test_routing_equals_running_the_samples_one_by_one_or_is_refused(self, name, method):
        row = TABLE[name]
        model, x = row.adapted(method, adapter="a"), row.input()
        own = {"target_regex": "^0", **row.options}
        disha.inject_adapters(model, r=1, adapter="b", **own)
        perturb(model)
        names = (["b", "a", None] * len(x))[: len(x)]
        if not row.routes:
            with (
                pytest.raises((ArgumentError, ModeError), match="can't"),
                disha.route_adapters(model, names),
            ):
                row.output(model, x)
            return
        with disha.route_adapters(model, names):
            routed = row.output(model, x)
        for adapter, sample, output in zip(names, x, routed, strict=True):
            disha.set_active_adapters(model, [] if adapter is None else adapter)
            close(output, row.output(model, sample[None])[0])

    def test_compiled_once_whatever_changes(self, name, method):
        row = TABLE[name]
        model, x = row.adapted(method, adapter="a"), row.input()
        own = {"target_regex": "^0", **row.options}
        kind, r_out = ("bone", 2) if method == "tile" else (method, None)
        disha.inject_adapters(model, r=2, method=kind, r_out=r_out, adapter="b", **own)
        perturb(model)
        torch._dynamo.reset()
        counter = CompileCounter()

        def run(x):
            return row.output(model, x)

        compiled = torch.compile(run, backend=counter, fullgraph=row.compiles)
        blocks = list(disha.adapter_parameters(model, "b"))
        y = torch.randn_like(run(x))
        close(compiled(x), run(x))
        found = torch.autograd.grad((compiled(x) * y).sum(), blocks)
        for one, other in zip(found, torch.autograd.grad((run(x) * y).sum(), blocks), strict=True):
            close(one, other)
        compilations = counter.frame_count
        disha.set_adapter_scale(model, 0.3, "b")
        close(compiled(x), run(x))
        disha.set_active_adapters(model, "a")
        close(compiled(x), run(x))
        with disha.adapters_disabled(model):
            close(compiled(x), run(x))
        close(compiled(x), run(x))
        if row.compiles:
            assert counter.frame_count == compilations == 1

    def test_exported_is_eager(self, name, method):
        row = TABLE[name]
        if not row.exports or row.call is not Row.call:
            return
        model, x = row.adapted(method), row.input()
        perturb(model)
        found = torch.export.export(model, (x,), strict=True).module()(x)
        close(found[0] if isinstance(found, tuple) else found, row.output(model, x))

    def test_traced_is_eager(self, name, method):
        row = TABLE[name]
        model, x = row.adapted(method).eval(), row.input()
        if row.call is not Row.call:
            return
        perturb(model)
        traced = torch.jit.trace(model[0], (x,), check_trace=False)
        found = traced(x)
        close(found[0] if isinstance(found, tuple) else found, row.output(model, x))

    @needs_fully_shard
    @pytest.mark.usefixtures("process_group")
    def test_fully_sharded(self, name, method):
        from torch.distributed.fsdp import fully_shard

        row = TABLE[name]
        model, x = row.adapted(method, torch.float32), row.input(torch.float32)
        perturb(model)
        blocks = list(disha.adapter_parameters(model))
        expected = row.output(model, x)
        gradients = torch.autograd.grad(expected.sum(), blocks)
        model[0] = fully_shard(model[0])
        output = row.output(model, x)
        close(output, expected, torch.float32)
        output.sum().backward()
        for block, wanted in zip(disha.adapter_parameters(model), gradients, strict=True):
            close(block.grad.full_tensor(), wanted, torch.float32)


@pytest.fixture
def process_group():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()
