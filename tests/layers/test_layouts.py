"""Every layout with every kind of block in every dtype, against the oracle's dense weights.

`CASES` has one for each layout, and for each way in which a module can have weights of it.
"""

import io
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
from tests.conftest import freshly_compiled, needs_fully_shard, perturb, seed_torch
from tests.every_pair import (
    NO_TILE,
    Case,
    DtypeTests,
    PairTests,
    call_module,
    close,
    every_kind,
    indices,
    numbers,
    one_kind_each,
)


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
    """Uses its own parameters, one in a product and one in an einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Parameter(torch.randn(5, 8))
        self.out = nn.Parameter(torch.randn(4, 5))

    def forward(self, x):
        return torch.einsum("ni,oi->no", x @ self.into.mT, self.out)


def attend_to_itself(module, x):
    return module(x, x, x, need_weights=False)


def call_with_two_inputs(module, x):
    return module(torch.cat([x, x[:, :1]], 1), x)


OUT_IN_STACK = {"layouts": {"mix": "expert out in"}}
IN_OUT_STACK = {"layouts": {"mix": "expert in out"}}
TWO_RANGES = {"rows": {"^0$": [(4, 6), (0, 2)]}}
NO_ROUTES = "can't"

CASES = {
    "out in": Case(lambda: nn.Linear(5, 6), numbers(3, 4, 5)),
    "out in, raw": Case(
        Raw,
        numbers(3, 8),
        kinds=NO_TILE,
        settings={"layouts": {"into": "out in", "out$": "out in"}, "target_regex": "into|out"},
        routing_error=NO_ROUTES,
    ),
    "out in, recurrent": Case(
        lambda: nn.LSTM(4, 6, 2, bidirectional=True, proj_size=4, batch_first=True),
        numbers(3, 5, 4),
        routing_error=NO_ROUTES,
        is_one_graph=False,
    ),
    "out in, gates": Case(
        lambda: nn.GRU(4, 6, bias=False, batch_first=True),
        numbers(3, 5, 4),
        routing_error=NO_ROUTES,
        is_one_graph=False,
    ),
    "out in, cell": Case(lambda: nn.LSTMCell(4, 6), numbers(3, 4), routing_error=NO_ROUTES),
    "in out": Case(lambda: Conv1D(6, 5), numbers(3, 4, 5)),
    "index out": Case(lambda: nn.Embedding(7, 4), indices(7, 3, 5)),
    "index out, padding": Case(lambda: nn.Embedding(7, 4, padding_idx=3), indices(7, 3, 5)),
    "index out, bags": Case(
        lambda: nn.EmbeddingBag(7, 4, mode="sum"), indices(7, 3, 5), routing_error=NO_ROUTES
    ),
    "out in *kernel": Case(lambda: nn.Conv1d(6, 4, 3, groups=2), numbers(2, 6, 5)),
    "out in *kernel, 2": Case(
        lambda: nn.Conv2d(3, 4, (3, 2), padding=1, padding_mode="circular"), numbers(2, 3, 5, 4)
    ),
    "in out *kernel": Case(lambda: nn.ConvTranspose2d(4, 8, 2, groups=2), numbers(2, 4, 3, 3)),
    "expert out in": Case(
        lambda: Experts("expert out in", whole=False),
        numbers(6, 8),
        settings=OUT_IN_STACK,
        routing_error=NO_ROUTES,
    ),
    "expert in out": Case(
        lambda: Experts("expert in out", whole=False),
        numbers(6, 8),
        settings=IN_OUT_STACK,
        routing_error=NO_ROUTES,
    ),
    "expert out in, whole": Case(
        lambda: Experts("expert out in", whole=True),
        numbers(6, 8),
        settings=OUT_IN_STACK,
        routing_error=NO_ROUTES,
        has_own_product=True,
    ),
    "expert in out, whole": Case(
        lambda: Experts("expert in out", whole=True),
        numbers(6, 8),
        settings=IN_OUT_STACK,
        routing_error=NO_ROUTES,
        has_own_product=True,
    ),
    "expert out in, bilinear": Case(
        lambda: nn.Bilinear(6, 5, 4),
        numbers(3, 5),
        kinds=NO_TILE,
        call=call_with_two_inputs,
        routing_error=NO_ROUTES,
    ),
    "rows": Case(
        lambda: nn.Linear(5, 6), numbers(3, 4, 5), settings=TWO_RANGES, has_own_product=True
    ),
    "rows, in out": Case(
        lambda: Conv1D(6, 5), numbers(3, 4, 5), settings=TWO_RANGES, has_own_product=True
    ),
    "rows, convolution": Case(
        lambda: nn.Conv1d(4, 6, 3), numbers(3, 4, 5), settings=TWO_RANGES, has_own_product=True
    ),
    "rows, embedding": Case(
        lambda: nn.Embedding(7, 6), indices(7, 3, 5), settings=TWO_RANGES, has_own_product=True
    ),
    "rows, attention": Case(
        lambda: nn.MultiheadAttention(6, 2, batch_first=True),
        numbers(3, 4, 6),
        call=attend_to_itself,
        has_own_product=True,
    ),
}

COMPLEX = (
    "out in",
    "out in, raw",
    "in out",
    "out in *kernel",
    "in out *kernel",
    "expert out in",
    "expert in out, whole",
    "rows",
)
"""The cases that are also tried with complex numbers. torch trains no complex lookups."""


def test_every_layout_is_tried():
    tried = {name.split(",")[0] for name in CASES}
    assert tried >= set(functional.PATTERNS), "add a case for each layout to CASES"


def every_dtype():
    """Return (name, kind, dtype): every kind of a case in float64, and one in each other dtype.

    There the kinds take turns, so that each meets each dtype in some of the cases.
    """
    cells = [(name, kind, torch.float64) for name, kind in every_kind(CASES)]
    for turn, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16, torch.complex64)):
        names = COMPLEX if dtype.is_complex else CASES
        pairs = one_kind_each({name: CASES[name] for name in names}, turn)
        cells += [(name, kind, dtype) for name, kind in pairs]
    return cells


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("name", "kind", "dtype"), every_dtype())
class TestEveryDtype(DtypeTests):
    table = CASES


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("name", "kind"), every_kind(CASES))
class TestEveryPair(PairTests):
    table = CASES

    @needs_fully_shard
    @pytest.mark.usefixtures("process_group")
    def test_fully_sharded(self, name, kind):
        from torch.distributed.fsdp import fully_shard

        case = CASES[name]
        model = perturb(case.adapted(kind, torch.float32))
        x = case.input(torch.float32)
        blocks = list(disha.adapter_parameters(model))
        expected = case.output(model, x)
        gradients = torch.autograd.grad(expected.sum(), blocks)
        model[0] = fully_shard(model[0])
        output = case.output(model, x)
        close(output, expected, torch.float32)
        output.sum().backward()
        for block, gradient in zip(disha.adapter_parameters(model), gradients, strict=True):
            close(block.grad.full_tensor(), gradient, torch.float32)


# --- compiled, exported, traced ------------------------------------------------------------------

ONE_OF_EACH_PRODUCT = (
    "out in",
    "index out",
    "out in *kernel",
    "expert out in",
    "expert in out, whole",
    "rows",
)
ONE_EACH = one_kind_each(CASES)
COMPILED = sorted({*ONE_EACH, *every_kind({name: CASES[name] for name in ONE_OF_EACH_PRODUCT})})
"""Compiling takes time: one case of each product has every kind, and the others one kind each."""

TRACED = [(name, kind) for name, kind in COMPILED if CASES[name].call is call_module]
"""Of these, the modules that are called with their input alone."""

EXPORTED = [pair for pair in ONE_EACH if pair in TRACED and CASES[pair[0]].is_one_graph]
"""`tests/whole/test_leaving_pytorch.py` exports every method."""


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("name", "kind"), COMPILED)
def test_compiled_once_whatever_changes(name, kind):
    case = CASES[name]
    x = case.input()
    model = case.adapted(kind, adapter="a")
    perturb(case.adapt(model, r=2, adapter="b", **reference.settings_of(kind, 2)))
    counter = CompileCounter()

    def run(x):
        return case.output(model, x)

    compiled = freshly_compiled(run, counter, fullgraph=case.is_one_graph)
    blocks = list(disha.adapter_parameters(model, "b"))
    cotangent = torch.randn_like(run(x))
    close(compiled(x), run(x))
    gradients = torch.autograd.grad((compiled(x) * cotangent).sum(), blocks)
    expected = torch.autograd.grad((run(x) * cotangent).sum(), blocks)
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        close(gradient, expected_gradient)
    compilations = counter.frame_count
    disha.set_adapter_scale(model, 0.3, "b")
    close(compiled(x), run(x))
    disha.set_active_adapters(model, "a")
    close(compiled(x), run(x))
    with disha.adapters_disabled(model):
        close(compiled(x), run(x))
    close(compiled(x), run(x))
    if case.is_one_graph:
        assert counter.frame_count == compilations == 1


@pytest.mark.parametrize(("name", "kind"), EXPORTED)
def test_exported_is_eager(name, kind):
    case = CASES[name]
    model = perturb(case.adapted(kind))
    x = case.input()
    output = torch.export.export(model, (x,), strict=True).module()(x)
    close(first_of(output), case.output(model, x))


@pytest.mark.parametrize(("name", "kind"), TRACED)
def test_traced_and_saved_is_eager(name, kind):
    case = CASES[name]
    model = perturb(case.adapted(kind).eval())
    x = case.input()
    traced = torch.jit.trace(model[0], (x,), check_trace=False)
    close(first_of(traced(x)), case.output(model, x))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    close(first_of(torch.jit.load(file)(x)), case.output(model, x))


def first_of(output):
    return output[0] if isinstance(output, tuple) else output


# --- pieces of a weight --------------------------------------------------------------------------


class Holder(nn.Module):
    """One parameter, for which a layout is declared."""

    def __init__(self, shape) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(shape, dtype=torch.float64))


def at(dim, index):
    """Return an index into a dimension, for [ ]."""
    return (slice(None),) * dim + (index,)


PIECES = {
    "one by [ ]": lambda weight, dim: weight[at(dim, 1)],
    "one by a tensor": lambda weight, dim: weight[at(dim, torch.tensor(1))],
    "some by [ ]": lambda weight, dim: weight[at(dim, torch.tensor([1, 0, 1]))],
    "a slice": lambda weight, dim: weight[at(dim, slice(1, 3))],
    "every second": lambda weight, dim: weight[at(dim, slice(None, None, 2))],
    "the only index": lambda weight, dim: (weight[1], weight[torch.tensor([1, 0])], weight[1:3]),
    "iteration": lambda weight, dim: tuple(weight),
    "movedim": lambda weight, dim: weight.movedim(dim, 0),
    "a turn": lambda weight, dim: weight.transpose(dim, -1),
    "transposed": lambda weight, dim: weight.mT,
}
PIECES_BY_DIM = {
    "select": lambda weight, dim: weight.select(dim, 1),
    "index_select": lambda weight, dim: weight.index_select(dim, torch.tensor([1, 0, 1])),
    "narrow": lambda weight, dim: weight.narrow(dim, 1, 1),
    "unbind": lambda weight, dim: weight.unbind(dim),
    "split": lambda weight, dim: weight.split(1, dim),
    "chunk": lambda weight, dim: weight.chunk(2, dim),
    "a sum": lambda weight, dim: weight.sum(dim),
}
"""Operations that take a dimension, which may be counted from the end."""

PATTERNS_AND_METHODS = list(itertools.product(functional.PATTERNS, functional.METHODS))


@pytest.mark.parametrize("piece", PIECES)
def test_a_piece_of_a_weight_is_that_of_the_dense_weight(piece):
    """A rule that takes a layout's axes for others gives wrong values here."""
    for pattern, method in PATTERNS_AND_METHODS:
        weight, dense = adapted_and_dense(pattern, method)
        for dim in range(dense.dim()):
            check_pieces(PIECES[piece](weight(), dim), PIECES[piece](dense, dim))


@pytest.mark.parametrize("piece", PIECES_BY_DIM)
def test_a_piece_by_its_dimension_is_that_of_the_dense_weight(piece):
    for pattern, method in PATTERNS_AND_METHODS:
        weight, dense = adapted_and_dense(pattern, method)
        for dim in range(-dense.dim(), dense.dim()):
            check_pieces(PIECES_BY_DIM[piece](weight(), dim), PIECES_BY_DIM[piece](dense, dim))


def adapted_and_dense(pattern, method):
    """Return a function that reads an adapted weight, and the dense weight that it stands for."""
    seed_torch(0)
    model = Holder(reference.shape_of(pattern))
    perturb(disha.inject_adapters(model, "mix", 2, method=method, layouts={"mix": pattern}))
    (block,) = disha.adapter_parameters(model)
    base = model._parameters["mix"].detach()
    delta = reference.layout_delta_weight(method, pattern, block.detach(), base)
    return lambda: model.mix, base + delta


def check_pieces(pieces, expected):
    if not isinstance(expected, tuple):
        pieces, expected = (pieces,), (expected,)
    for piece, expected_piece in zip(pieces, expected, strict=True):
        assert piece.shape == expected_piece.shape
        close(piece + 0.0, expected_piece)


def test_parts_that_overlap_in_another_way_are_refused():
    model = disha.inject_adapters(Holder((4, 6)), "mix", 2, layouts={"mix": "out in"})
    with pytest.raises(disha.TargetError, match="another adapter has it with the layout 'out in'"):
        disha.inject_adapters(model, "mix", 2, layouts={"mix": "in out"}, adapter="other")
    with pytest.raises(disha.ArgumentError, match="q_proj has rows of its own"):
        disha.plan_adapters(nn.MultiheadAttention(8, 2), "in_proj", 2, rows={"in_proj": [(0, 8)]})
