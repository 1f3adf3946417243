"""Products of an effective weight: by any call, with sparse and jagged inputs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import disha
from disha import ModeError
from tests.conftest import (
    freshly_compiled,
    merged_weight,
    perturb,
)
from tests.effective.weights import adapted_weight
from tests.reference import METHODS


@pytest.mark.parametrize(
    "multiply",
    [
        lambda x, w: torch.mm(input=x, mat2=w.T),
        lambda x, w: x.mm(mat2=w.T),
        lambda x, w: torch.mv(w, vec=x[0]),
        lambda x, w: torch.mv(input=w, vec=x[0]),
        lambda x, w: torch.matmul(input=x, other=w.T),
        lambda x, w: torch.matmul(x, w.T, out=None),
        lambda x, w: torch.addmm(input=torch.ones(3), mat1=x, mat2=w.T),
        lambda x, w: F.normalize(input=w),
        lambda x, w: torch.where(condition=w > 0, input=w, other=torch.zeros(())),
    ],
)
def test_by_keywords(multiply):
    layer, weight = adapted_weight()
    x, dense = torch.randn(2, 4), merged_weight(layer)
    torch.testing.assert_close(multiply(x, weight), multiply(x, dense))


@pytest.mark.parametrize(
    ("multiply", "x"),
    [
        (torch.bmm, torch.randn(1, 5, 4)),
        (torch.Tensor.bmm, torch.randn(1, 5, 4)),
        (torch.mm, torch.randn(3, 5, 4)),
        (lambda x, stack: torch.mm(x, stack[0]), torch.randn(3, 5, 4)),
        (lambda x, stack: torch.mv(stack[0].T, x), torch.randn(4, 5)),
    ],
)
def test_products_that_do_not_broadcast_are_refused_as_by_torch(multiply, x):
    model = nn.Module()
    model.stack = nn.Parameter(torch.randn(3, 4, 6))
    disha.inject_adapters(model, "stack", 2, layouts={"stack": "expert in out"}, init="kaiming")
    for stack in (model.stack, torch.randn(3, 4, 6)):
        with pytest.raises(RuntimeError, match=r"size|2D|matrix|vector|[Mm]atrices"):
            multiply(x, stack)


@pytest.mark.parametrize("index", [[-1, 2, -6], [0, 5]])
def test_rows_of_a_table_count_from_the_end_too(index):
    layer = disha.inject_adapters(nn.Embedding(6, 3), "", r=2, init="kaiming")
    dense = merged_weight(layer)
    at = torch.tensor(index)
    torch.testing.assert_close(layer.weight[at], dense[at])
    mask = torch.tensor([1, 0, 1, 0, 0, 1], dtype=torch.bool)
    torch.testing.assert_close(layer.weight[mask], dense[mask])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("padding_idx", [1, -5])
def test_a_padding_row_of_a_raw_table_gives_no_gradient(method, padding_idx):
    model = nn.Module()
    model.table = nn.Parameter(torch.randn(6, 4))
    disha.inject_adapters(model, "table", 2, method=method, layouts={"table": "index out"})
    perturb(model)
    [block] = disha.adapter_parameters(model)
    dense = (model.table + 0).detach()
    indices = torch.tensor([[0, 1, 3], [5, 1, 1]])
    output = F.embedding(indices, model.table, padding_idx)
    torch.testing.assert_close(output, F.embedding(indices, dense, padding_idx))
    (found,) = torch.autograd.grad(output.square().sum(), block)
    others = F.embedding(indices[indices != 1], model.table)
    (expected,) = torch.autograd.grad(others.square().sum(), block)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_sparse_inputs(method):
    layer = perturb(disha.inject_adapters(nn.Linear(4, 3, bias=False), "", 2, method=method))
    x = torch.randn(5, 4).relu()
    torch.testing.assert_close(layer(x.to_sparse()), layer(x))


@pytest.mark.parametrize(
    "multiply",
    [
        lambda x, weight: x @ weight,
        lambda x, weight: torch.addmm(torch.ones(weight.shape[1]), x, weight),
    ],
)
def test_a_weight_without_a_transposed_layout_is_computed(multiply):
    table = nn.Embedding(7, 4, padding_idx=2)
    disha.inject_adapters(table, "", 2, init="kaiming")
    x = torch.randn(3, 7)
    torch.testing.assert_close(multiply(x, table.weight), multiply(x, table.weight.clone()))


def test_a_product_into_out_acts_unless_a_gradient_would_be_lost():
    layer, weight = adapted_weight()
    x, out = torch.randn(5, 4), torch.empty(5, 2)
    with torch.no_grad(), pytest.raises(ModeError, match=r"no gradient.*exclude='lm_head'"):
        torch.mm(x, weight[1:].to(torch.float32).t(), out=out)  # as the loss of trl does
    expected = torch.mm(x, weight[1:].t()).detach()
    layer.disha["default"].block.requires_grad_(False)
    torch.mm(x, layer.weight[1:].t(), out=out)
    torch.testing.assert_close(out, expected)


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

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
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

    def test_dropout_is_refused(self):
        model, nested = self.model(dropout=0.5)
        with pytest.raises(ModeError, match="the adapter's dropout can't act here"):
            model.train()(nested)

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


@pytest.mark.parametrize("method", METHODS)
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
