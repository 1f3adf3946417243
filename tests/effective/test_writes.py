"""Whatever writes into an effective weight writes into W."""

import itertools
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import disha
from disha import ArgumentError
from tests.conftest import (
    freshly_compiled,
    merged_weight,
    perturb,
    seed_torch,
)
from tests.effective.weights import adapted_weight


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
def test_writes_reach_the_base(write):
    layer, weight = adapted_weight()
    parameter, blocks = layer.base_weight, layer.disha["default"].block.clone()
    with torch.no_grad():
        write(weight)
    assert layer.base_weight is parameter
    assert torch.equal(parameter, torch.ones(3, 4))
    assert torch.equal(layer.disha["default"].block, blocks)


@pytest.mark.parametrize(("made", "name"), [(nn.Linear, "weight"), (nn.LSTM, "weight_ih_l0")])
def test_an_operator_that_assigns_its_result_writes_into_the_base(made, name):
    layer = disha.inject_adapters(made(4, 3), "", r=2, init="kaiming")
    parameter = layer._parameters[name]
    expected = [one.detach() + 1.0 for one in (parameter, getattr(layer, name))]
    with torch.no_grad():
        setattr(layer, name, operator.iadd(getattr(layer, name), 1.0))  # layer.weight += 1.0
    assert layer._parameters[name] is parameter
    torch.testing.assert_close(parameter.detach(), expected[0])
    torch.testing.assert_close(getattr(layer, name).detach() + 0.0, expected[1])


@pytest.mark.parametrize(
    "draw",
    [
        lambda w: nn.init.trunc_normal_(w, std=0.5, a=-0.1, b=0.1),
        lambda w: nn.init.trunc_normal_(w),
        lambda w: nn.init.orthogonal_(w),
        lambda w: nn.init.orthogonal_(tensor=w, gain=2.0),
        lambda w: nn.init.orthogonal_(gain=2.0, tensor=w),
        lambda w: torch.ops.aten.mul_(w, 2.0),
        lambda w: torch.ops.aten.add_.Tensor(w, w.new_ones(4)),
        lambda w: F.elu(w, inplace=True),
    ],
)
def test_what_is_drawn_or_changed_in_place_is_that_of_a_plain_weight(draw):
    layer, weight = adapted_weight()
    plain = layer.base_weight.detach().clone()
    found = []
    for tensor in (weight, plain):
        seed_torch(3)
        with torch.no_grad():
            found.append(draw(tensor))
    assert torch.equal(layer.base_weight, plain)
    torch.testing.assert_close(found[0] + 0, merged_weight(layer))


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.copy_(layer.weight),
        lambda layer: layer.weight.copy_(other=layer.weight),
        lambda layer: layer.weight.data.copy_(layer.weight.data),
        lambda layer: layer.weight.__setitem__(slice(None), layer.weight),
        lambda layer: layer.weight.__setitem__(slice(2), layer.weight[:2].mul_(1)),
    ],
)
@pytest.mark.parametrize("method", ["bone", "lora"])  # whose parts of blocks are views, and copies
def test_written_into_itself_it_adds_no_update_twice(write, method):
    layer = perturb(disha.inject_adapters(nn.Linear(4, 3), "all-linear", 2, method=method))
    before = layer.base_weight.detach().clone()
    with torch.no_grad():
        write(layer)
    assert torch.equal(layer.base_weight, before)


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
