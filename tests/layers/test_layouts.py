"""Every layout x method x dtype, held against dense weights that slow loops have computed.

One row for each layout, and for each way in which a module can have weights of it.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers.pytorch_utils import Conv1D

import disha
from disha import functional
from tests import reference
from tests.conftest import Made, freshly_compiled, needs_fully_shard, perturb
from tests.every_pair import METHODS_WITHOUT_TILE, DtypeTests, PairTests, Row, close


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


def raw(self, x):
    """The forward of a module that uses its own parameters in a product and in an einsum."""
    return torch.einsum("ni,oi->no", x @ self.into.mT, self.out)


def attention(module, x):
    return module(x, x, x, need_weights=False)


EXPERTS = {"layouts": {"mix": "expert out in"}}
EXPERTS_TURNED = {"layouts": {"mix": "expert in out"}}
OWN = {"into": (5, 8), "out": (4, 5)}
RAW = {"layouts": {"into": "out in", "out$": "out in"}, "target_regex": "into|out"}
ROWS = {"options": {"rows": {"^0$": [(4, 6), (0, 2)]}}, "splits": True}

TABLE = {
    "out in": Row(lambda: nn.Linear(5, 6), (3, 4, 5)),
    "out in, raw": Row(
        lambda: Made(raw, **{name: nn.Parameter(torch.randn(size)) for name, size in OWN.items()}),
        (3, 8), options=RAW, methods=METHODS_WITHOUT_TILE, routes=False,
    ),
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
        lambda: Experts("expert out in", True), (6, 8), options=EXPERTS, routes=False, splits=True
    ),
    "expert in out, whole": Row(
        lambda: Experts("expert in out", True), (6, 8), options=EXPERTS_TURNED, routes=False,
        splits=True,
    ),
    "expert out in, bilinear": Row(
        lambda: nn.Bilinear(6, 5, 4), (3, 5), routes=False, methods=METHODS_WITHOUT_TILE,
        call=lambda module, x: module(torch.cat([x, x[:, :1]], 1), x),
    ),
    "rows": Row(lambda: nn.Linear(5, 6), (3, 4, 5), **ROWS),
    "rows, in out": Row(lambda: Conv1D(6, 5), (3, 4, 5), **ROWS),
    "rows, convolution": Row(lambda: nn.Conv1d(4, 6, 3), (3, 4, 5), **ROWS),
    "rows, embedding": Row(lambda: nn.Embedding(7, 6), (3, 5), indices=7, **ROWS),
    "rows, attention": Row(
        lambda: nn.MultiheadAttention(6, 2, batch_first=True), (3, 4, 6), call=attention,
        splits=True,
    ),
}  # fmt: skip


def test_every_layout_is_tried():
    tried = {name.split(",")[0] for name in TABLE}
    assert tried >= set(functional.PATTERNS), "add a row for each layout to TABLE"


PAIRS = [(name, method) for name, row in TABLE.items() for method in row.methods]
OTHER_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CELLS = [(name, method, torch.float64) for name, method in PAIRS] + [
    (name, row.methods[(place + turn) % len(row.methods)], dtype)
    for place, (name, row) in enumerate(TABLE.items())
    for turn, dtype in enumerate(OTHER_DTYPES)
]
"""Every pair in float64, and every layout once in each other dtype."""

ALONE = [(name, method) for name, method in PAIRS if TABLE[name].call is Row.call]
"""Modules that are called with their input alone."""

OF_EVERY_METHOD = (
    "out in",
    "index out",
    "out in *kernel",
    "expert out in",
    "expert in out, whole",
    "rows",
)
COMPILED = [
    (name, method)
    for place, (name, row) in enumerate(TABLE.items())
    for turn, method in enumerate(row.methods)
    if name in OF_EVERY_METHOD or turn == place % len(row.methods)
]
"""One row of each kind of product with every method, and the other rows once."""

EXPORTED = [pair for pair in COMPILED if pair in ALONE and TABLE[pair[0]].exports]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("name", "method", "dtype"), CELLS)
class TestEveryDtype(DtypeTests):
    table = TABLE


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("name", "method"), PAIRS)
class TestEveryPair(PairTests):
    table = TABLE

    @needs_fully_shard
    @pytest.mark.usefixtures("process_group")
    def test_fully_sharded(self, name, method):
        from torch.distributed.fsdp import fully_shard

        row = TABLE[name]
        model, x = perturb(row.adapted(method, torch.float32)), row.input(torch.float32)
        blocks = list(disha.adapter_parameters(model))
        expected = row.output(model, x)
        gradients = torch.autograd.grad(expected.sum(), blocks)
        model[0] = fully_shard(model[0])
        output = row.output(model, x)
        close(output, expected, torch.float32)
        output.sum().backward()
        for block, wanted in zip(disha.adapter_parameters(model), gradients, strict=True):
            close(block.grad.full_tensor(), wanted, torch.float32)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("name", "method"), COMPILED)
def test_compiled_once_whatever_changes(name, method):
    row = TABLE[name]
    model, x = row.adapted(method, adapter="a"), row.input()
    own = {"target_regex": "^0", **row.options}
    own |= reference.settings_of(method, 2)
    perturb(disha.inject_adapters(model, r=2, adapter="b", **own))
    counter = CompileCounter()

    def run(x):
        return row.output(model, x)

    compiled = freshly_compiled(run, counter, row.compiles)
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


@pytest.mark.parametrize(("name", "method"), EXPORTED)
def test_exported_is_eager(name, method):
    row = TABLE[name]
    model, x = perturb(row.adapted(method)), row.input()
    found = torch.export.export(model, (x,), strict=True).module()(x)
    close(found[0] if isinstance(found, tuple) else found, row.output(model, x))


@pytest.mark.parametrize(("name", "method"), ALONE)
def test_traced_is_eager(name, method):
    row = TABLE[name]
    model, x = perturb(row.adapted(method).eval()), row.input()
    found = torch.jit.trace(model[0], (x,), check_trace=False)(x)
    close(found[0] if isinstance(found, tuple) else found, row.output(model, x))


class Holder(nn.Module):
    """One parameter, for which a layout is declared."""

    def __init__(self, shape) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(shape, dtype=torch.float64))


PIECES = {
    "select": lambda weight, dim: weight.select(dim, 1),
    "one by [ ]": lambda weight, dim: weight[(slice(None),) * dim + (1,)],
    "one by a tensor": lambda weight, dim: weight[(slice(None),) * dim + (torch.tensor(1),)],
    "some by [ ]": lambda weight, dim: weight[(slice(None),) * dim + (torch.tensor([1, 0, 1]),)],
    "a slice": lambda weight, dim: weight[(slice(None),) * dim + (slice(1, 3),)],
    "every second": lambda weight, dim: weight[(slice(None),) * dim + (slice(None, None, 2),)],
    "the only index": lambda weight, dim: (weight[1], weight[torch.tensor([1, 0])], weight[1:3]),
    "index_select": lambda weight, dim: weight.index_select(dim, torch.tensor([1, 0, 1])),
    "narrow": lambda weight, dim: weight.narrow(dim, 1, 1),
    "unbind": lambda weight, dim: weight.unbind(dim),
    "split": lambda weight, dim: weight.split(1, dim),
    "chunk": lambda weight, dim: weight.chunk(2, dim),
    "iteration": lambda weight, dim: tuple(weight),
    "movedim": lambda weight, dim: weight.movedim(dim, 0),
    "a turn": lambda weight, dim: weight.transpose(dim, -1),
    "transposed": lambda weight, dim: weight.mT,
    "a sum": lambda weight, dim: weight.sum(dim),
}


@pytest.mark.parametrize("piece", PIECES)
def test_a_piece_of_a_weight_is_that_of_the_dense_weight(piece):
    """A rule that takes a layout's axes for others gives wrong values here."""
    for pattern, method in itertools.product(functional.PATTERNS, functional.METHODS):
        check_piece(pattern, method, piece)


def check_piece(pattern, method, piece):
    torch.manual_seed(0)
    shape = reference.shape_of(pattern)
    model = Holder(shape)
    perturb(disha.inject_adapters(model, "mix", 2, method=method, layouts={"mix": pattern}))
    (block,) = disha.adapter_parameters(model)
    base = model._parameters["mix"].detach()
    dense = base + reference.layout_delta_weight(method, pattern, block.detach(), base)
    for dim in range(len(shape)):
        for at in {dim, dim - len(shape)} if piece in BY_NUMBER else {dim}:
            found, expected = PIECES[piece](model.mix, at), PIECES[piece](dense, at)
            several = isinstance(expected, tuple)
            pairs = zip(found, expected, strict=True) if several else [(found, expected)]
            for one, other in pairs:
                assert one.shape == other.shape
                close(one + 0.0, other)


def test_parts_that_overlap_in_another_way_are_refused():
    model = disha.inject_adapters(Holder((4, 6)), "mix", 2, layouts={"mix": "out in"})
    with pytest.raises(disha.TargetError, match="another adapter has it with the layout 'out in'"):
        disha.inject_adapters(model, "mix", 2, layouts={"mix": "in out"}, adapter="other")
    with pytest.raises(disha.ArgumentError, match="q_proj has rows of its own"):
        disha.plan_adapters(nn.MultiheadAttention(8, 2), "in_proj", 2, rows={"in_proj": [(0, 8)]})


BY_NUMBER = ("select", "index_select", "narrow", "unbind", "split", "chunk", "a sum")
