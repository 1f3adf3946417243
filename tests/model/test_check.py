"""check_adapters: what it finds in models that use their weights in good and in bad ways."""

import copy

import pytest
import torch
from torch import nn

import disha
from disha import ArgumentError, CheckReport, MergeError, ModeError, functional
from disha.functional import Method
from disha.model.check import CheckedWeight
from tests.conftest import Tied, assert_unchanged, snapshot


class Model(nn.Module):
    """Uses its layer as a function says."""

    def __init__(self, use):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.use = use

    def forward(self, x):
        return self.use(self.layer, x)


class Rounded(torch.autograd.Function):
    """Rounds in the forward pass, and stops the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.round(decimals=3)

    @staticmethod
    def backward(ctx, gradient):
        return None


@torch.jit.script
def scripted(x: torch.Tensor, weight: torch.Tensor):
    return torch.nn.functional.linear(x, weight)


USES = {
    "as it should": (lambda layer, x: layer(x), (True, True, True, True), ""),
    "in a dict": (lambda layer, x: {"out": [layer(x)]}, (True, True, True, True), ""),
    "not at all": (lambda layer, x: 2 * x, (False, False, False, True), "does not use this weight"),
    "in vain": (
        lambda layer, x: x + 0 * layer(x),
        (True, False, False, True),
        "the update does not reach the output",
    ),
    "detached": (
        lambda layer, x: layer(x).detach() + x,
        (True, True, False, True),
        "stops its gradient",
    ),
    "rounded": (
        lambda layer, x: Rounded.apply(layer(x)),
        (True, True, False, True),
        "stops its gradient",
    ),
    "as W alone": (  # torch does not ask the arguments of a scripted function
        lambda layer, x: scripted(x, layer.weight),
        (True, False, False, False),
        "the update does not reach the output",
    ),
    "copied for a scripted function": (
        lambda layer, x: scripted(x, layer.weight.clone()),
        (True, True, True, True),
        "",
    ),
    "by its class": (
        lambda layer, x: layer(x) * (2 if layer.disha.merged is None else 1),
        (True, True, True, False),
        "",
    ),
}


@pytest.mark.parametrize("method", ["bone", "bat"])
@pytest.mark.parametrize("use", USES)
def test_what_is_seen_of_a_block(use, method):
    function, seen, reason = USES[use]
    model = disha.inject_adapters(Model(function), "layer", 2, method=method)
    model.train()
    before = snapshot(model)
    report = disha.check_adapters(model, torch.randn(3, 4))
    (found,) = report.weights
    assert (found.read, found.acts, found.gradient, found.merges) == seen
    assert reason in found.reason
    assert bool(reason) == bool(found.reason)
    assert report.ok == found.ok == all(seen)
    assert report.problems == (() if all(seen) else (found,))
    assert_unchanged(model, before)
    assert all(module.training for module in model.modules())


def test_only_the_layer_that_merges_to_something_else_is_named():
    first, last = Model(USES["as it should"][0]), Model(USES["by its class"][0])
    model = disha.inject_adapters(nn.Sequential(first, last), "all-linear", 2)
    report = disha.check_adapters(model, torch.randn(3, 4))
    assert [(one.name, one.merges) for one in report.weights] == [
        ("0.layer", True),
        ("1.layer", False),
    ]
    assert str(report).splitlines()[-1] == "1 of 2 blocks in order"


def test_a_merge_that_is_refused_is_no_problem():
    model = nn.Sequential(nn.Linear(4, 4))
    torch.nn.utils.parametrizations.weight_norm(model[0])
    disha.inject_adapters(model, "^0$", 2)
    report = disha.check_adapters(model, torch.randn(3, 4))
    (found,) = report.weights
    assert found.ok
    assert found.merges is None
    assert "computed from other parameters" in found.reason


def test_a_weight_whose_merge_is_refused_because_it_is_tied(tokens):
    model = disha.inject_adapters(Tied(), "embed|q_proj", 2, exclude="head")
    with pytest.raises(MergeError) as caught:
        disha.merge_adapters(model)
    report = disha.check_adapters(model, tokens)
    assert {(one.merges, one.reason) for one in report.weights} == {(None, str(caught.value))}


def test_a_frozen_block_is_not_in_order(model, tokens):
    disha.inject_adapters(model, "head|q_proj", 2)
    model.head.requires_grad_(False)
    trained = [one for one in model.parameters() if one.requires_grad]
    report = disha.check_adapters(model, tokens, optimizer=torch.optim.SGD(trained))
    (found,) = report.problems
    assert (found.name, found.acts, found.gradient) == ("head", True, False)
    assert "it acts, but it is frozen" in str(report)
    assert not model.head.disha["default"].block.requires_grad


def test_the_block_of_a_replaced_module_is_one_of_other_modules(model, tokens):
    """As when transformers resizes an adapted output head."""
    disha.inject_adapters(model, "head|q_proj", 2)
    optimizer = torch.optim.SGD(disha.adapter_parameters(model))
    assert "of other modules" not in str(disha.check_adapters(model, tokens, optimizer=optimizer))
    model.head = nn.Linear(model.head.in_features, 3).requires_grad_(False)
    report = disha.check_adapters(model, tokens, optimizer=optimizer)
    assert (report.unknown, report.untrained) == (1, ())
    assert "the optimizer has 1 parameter of other modules" in str(report)


def test_random_states_come_back():
    model = disha.inject_adapters(nn.Sequential(nn.Linear(4, 4), nn.Dropout()), "0", 2)
    state = torch.get_rng_state()
    disha.check_adapters(model, torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)


def test_random_layers_get_the_same_numbers_in_each_run():
    model = disha.inject_adapters(Model(lambda layer, x: layer(x) + torch.rand(4)), "layer", 2)
    assert disha.check_adapters(model, torch.randn(3, 4)).ok


class Squares(Method):
    """dW is a product of the block with itself, so a block of zeros has no gradient."""

    name = "squares"

    def shape(self, geometry, r, r_out):
        return (*geometry.stack, r, geometry.out_features)

    def delta(self, block, geometry, matrices):
        return functional.bone_delta_weight(block**2, geometry.in_features, geometry.out_features)


@pytest.mark.parametrize("init", ["zeros", "kaiming"])
def test_a_method_that_can_not_leave_zeros(monkeypatch, init):
    monkeypatch.setitem(functional.METHODS, "squares", Squares())
    model = nn.Sequential(nn.Linear(4, 4))
    disha.inject_adapters(model, "0", 2, method="squares", init=init)
    report = disha.check_adapters(model, torch.randn(3, 4))
    assert report.ok is (init == "kaiming")
    assert report.weights[0].acts
    assert ("a block of zeros gets no gradient" in str(report)) is (init == "zeros")
    with torch.no_grad():
        disha.adapter_parameters(model)[0].fill_(0.1)  # as after training from elsewhere
    assert disha.check_adapters(model, torch.randn(3, 4)).ok


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", ["bone", "bat"])
def test_modes_without_gradients_do_not_matter(method, mode):
    model = disha.inject_adapters(nn.Sequential(nn.Linear(4, 4)), "0", 2, method=method)
    x = torch.randn(3, 4)
    with mode():
        assert disha.check_adapters(model, x).ok


def test_no_other_device_is_seeded(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    model = disha.inject_adapters(nn.Sequential(nn.Linear(4, 4)), "0", 2)
    disha.check_adapters(model, torch.randn(3, 4))
    assert not seeded


def test_what_is_refused():
    x, model = torch.randn(3, 4), disha.inject_adapters(nn.Sequential(nn.Linear(4, 4)), "0", 2)
    merged = copy.deepcopy(model)
    disha.merge_adapters(merged)
    with pytest.raises(MergeError, match="can't check adapters while adapters are merged"):
        disha.check_adapters(merged, x)
    with disha.adapters_disabled(model), pytest.raises(ModeError, match="inside adapters_disabled"):
        disha.check_adapters(model, x)
    with pytest.raises(ArgumentError, match="returns no floating-point tensor"):
        disha.check_adapters(
            disha.inject_adapters(Model(lambda layer, x: layer(x) > 0), "layer", 2), x
        )
    disha.set_active_adapters(model, [])
    with pytest.raises(ArgumentError, match="no adapter is active; activate one"):
        disha.check_adapters(model, x)


def test_a_remark_on_several_weights_is_printed_once():
    reason = "a reason that several weights share"
    report = CheckReport((
        CheckedWeight("a", "default", True, True, True, None, reason),
        CheckedWeight("b", "default", True, True, False, None, "its own reason"),
        CheckedWeight("c", "default", True, True, True, None, reason),
    ))  # fmt: skip
    assert str(report).splitlines()[4:] == [
        f"a and 1 more: {reason}",
        "b: its own reason",
        "2 of 3 blocks in order",
    ]
