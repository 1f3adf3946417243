"""check_adapters: what it finds in models that use their weights in good and in bad ways."""

import copy
import gc
from enum import Enum

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import disha
from disha import ArgumentError, CheckReport, MergeError, ModeError
from disha.model import check_merges
from disha.model.check_report import CheckedWeight
from tests.conftest import Tied, assert_unchanged, refused, seed_torch, snapshot
from tests.reference import METHODS


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
    "as W alone": (
        lambda layer, x: scripted(x, getattr(layer.weight, "base", layer.weight)),
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
        "the model does something else when its weights are plain",
    ),
}


@pytest.mark.parametrize("method", METHODS)
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


def check(use, x=None, **settings):
    """Return the model that uses its layer so, and the only row of its report."""
    model = disha.inject_adapters(Model(use), "layer", 2, **settings)
    (row,) = disha.check_adapters(model, torch.randn(3, 4) if x is None else x).weights
    return model, row


class Cached(nn.Module):
    """Keeps what it has made of its weight, while it is in evaluation mode."""

    def __init__(self, make):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)
        self.make = make
        self.kept = None

    def forward(self, x):
        if self.training or self.kept is None:
            self.kept = self.make(self.layer.weight)
        return self.other(x @ self.kept)


@pytest.mark.parametrize(
    "make",
    [
        lambda weight: weight.detach().T,
        lambda weight: weight.detach().T + 0,
        lambda weight: weight.T,
    ],
)
def test_a_weight_that_the_model_keeps_is_named(make):
    model = disha.inject_adapters(Cached(make), "all-linear", 2, init="kaiming").eval()
    kept, other = disha.check_adapters(model, torch.randn(3, 4)).weights
    assert (kept.name, kept.acts, kept.ok) == ("layer", False, False)
    assert "keeps this weight" in kept.reason
    assert other.ok
    # What is said is so: an adapter that is switched off still acts.
    model.kept = None
    x = torch.randn(3, 4)
    with_update = model(x)
    with disha.adapters_disabled(model.layer):
        assert torch.equal(model(x), with_update)


@pytest.mark.filterwarnings("ignore:None of the inputs:UserWarning")
def test_reentrant_checkpointing_trains_as_torch_trains_it():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.inner = nn.Linear(4, 4)
            self.cut = nn.Linear(4, 4)

        def forward(self, x):
            hidden = checkpoint(self.inner, self.first(x), use_reentrant=True)
            return hidden + checkpoint(self.cut, x, use_reentrant=True)

    model = disha.inject_adapters(Checkpointed(), "all-linear", 2)
    x = torch.randn(3, 4)
    model(x).sum().backward()
    before = snapshot(model)
    gradients = {name: one.grad for name, one in model.named_parameters()}
    report = disha.check_adapters(model, x)
    assert {one.name: one.gradient for one in report.weights} == {
        "first": True,
        "inner": True,
        "cut": False,  # x needs no gradient, so this checkpoint has none
    }
    assert_unchanged(model, before)
    assert all(one.grad is gradients[name] for name, one in model.named_parameters())


class Kind(Enum):
    MEAN = "mean"


class Loop:
    """Refers to itself, as the output of a tree does whose nodes know their parents."""

    def __init__(self, values):
        self.values = values
        self.parent = self
        self.kind = Kind.MEAN


def test_outputs_may_hold_an_enum_or_refer_to_themselves():
    _, row = check(lambda layer, x: Loop([layer(x)]))
    assert row.ok


def test_complex_outputs_count():
    _, row = check(lambda layer, x: torch.fft.rfft(layer(x)))
    assert row.ok


class Energies(nn.Module):
    """A force field: forces are the gradient of the energy, with its graph in training only."""

    def __init__(self, keeps_graph=True):
        super().__init__()
        self.keeps_graph = keeps_graph
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1))

    def forward(self, positions):
        positions = positions.detach().requires_grad_()
        energy = self.layers(positions).sum()
        graph = self.training and self.keeps_graph
        (gradient,) = torch.autograd.grad(energy, positions, create_graph=graph)
        return {"energy": energy, "forces": -gradient}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_differentiates_in_its_forward(method, training):
    model = disha.inject_adapters(Energies(), "all-linear", 2, method=method)
    model.train(training)
    report = disha.check_adapters(model, torch.randn(5, 3))
    assert report.ok, report
    assert model.training is training


def test_a_gradient_that_the_forward_has_freed_is_explained():
    model = disha.inject_adapters(Energies(keeps_graph=False), "all-linear", 2)
    report = disha.check_adapters(model, torch.randn(5, 3))
    assert {row.gradient for row in report.weights} == {False}
    assert "its gradient can't be computed: Trying to backward through the graph" in str(report)


class Reversible(nn.Module):
    """Refuses to differentiate in evaluation, as Reformer's reversible layers do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        output = self.layer(x)
        if output.requires_grad:
            output.register_hook(self.refuse_in_evaluation)
        return output

    def refuse_in_evaluation(self, gradient):
        assert self.training, "use model.train()"


def test_a_model_that_differentiates_in_training_only():
    model = disha.inject_adapters(Reversible(), "layer", 2)
    assert disha.check_adapters(model, torch.randn(5, 3)).ok


class Heads(nn.Module):
    """Has a head that only training uses, which then may need something else."""

    def __init__(self, fails=False):
        super().__init__()
        self.main, self.extra = nn.Linear(4, 4), nn.Linear(4, 4)
        self.fails = fails

    def forward(self, x):
        if self.training and self.fails:
            raise ValueError("no targets")
        return (self.main(x), self.extra(x)) if self.training else self.main(x)


def test_a_head_that_acts_in_training_only_is_in_order():
    model = disha.inject_adapters(Heads(), "all-linear", 2)
    assert disha.check_adapters(model.eval(), torch.randn(3, 4)).ok
    assert not model.training


def test_a_block_acts_whatever_its_dropout_is():
    model = disha.inject_adapters(Heads(), "all-linear", 2, dropout=0.999)
    assert disha.check_adapters(model, torch.randn(3, 4)).ok


def test_a_merge_that_changes_the_evaluation_alone_is_a_problem():
    def use(layer, x):
        weight = layer.weight if layer.training else layer._parameters["weight"]
        return nn.functional.linear(x, weight)

    _, row = check(use)
    assert (row.acts, row.gradient, row.merges) == (True, True, False)
    assert "merged, an output differs" in row.reason


def test_the_report_says_that_training_mode_can_not_be_seen():
    model = disha.inject_adapters(Heads(fails=True), "all-linear", 2)
    (row,) = disha.check_adapters(model, torch.randn(3, 4)).problems
    assert row.name == "extra"
    assert "in training mode it raises ValueError with these inputs" in row.reason


def test_fewer_outputs_after_merging_are_a_problem():
    _, row = check(
        lambda layer, x: [layer(x), layer(x) + 1][: 2 if layer.disha.merged is None else 1]
    )
    assert row.merges is False
    assert row.reason == "merged, the model returns other tensors, or tensors of other shapes"


@pytest.mark.parametrize("size", [1e-5, 1.0, 1e5])
def test_the_size_of_outputs_does_not_matter(size):
    _, row = check(lambda layer, x: size * layer(x))
    assert row.ok
    _, row = check(lambda layer, x: size * layer(x) * (0.3 if layer.disha.merged else 1.0))
    assert row.merges is False


def test_a_masked_output_hides_no_other():
    def use(layer, x):
        scores = layer(x) * (0.3 if layer.disha.merged else 1.0)
        return torch.cat([scores, torch.full_like(scores, -1e9)])

    _, row = check(use)
    assert row.merges is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_output_that_only_rounding_makes_merges(dtype):
    """Sums of differences from the mean, which are zero but for their rounding."""
    seed_torch(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).to(dtype)
    model.append(Model(lambda layer, x: ((x - x.mean(-1, keepdim=True)).sum(-1).float(), x)))
    disha.inject_adapters(model, r"^[02]$", 4)
    report = disha.check_adapters(model, torch.randn(8, 64, dtype=dtype))
    assert report.ok, report


class Counts(nn.Module):
    """Counts its forwards, in place and by a new tensor."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("sums", torch.zeros(4))

    def forward(self, x):
        self.steps += 1
        self.sums = self.sums + x.sum(0)
        return self.norm(self.layer(x)) * self.steps


def test_outputs_of_which_none_is_finite_prove_nothing():
    model = disha.inject_adapters(Model(lambda layer, x: layer(x) / 0), "layer", 2)
    with refused(model, ArgumentError, "no finite floating-point number"):
        disha.check_adapters(model, torch.randn(3, 4))


@pytest.mark.parametrize("training", [False, True])
def test_buffers_that_a_forward_changes_come_back(training):
    model = disha.inject_adapters(Counts(), "layer", 2).train(training)
    before = snapshot(model)
    assert disha.check_adapters(model, torch.randn(3, 4)).ok
    assert_unchanged(model, before)


def replace_data(layer, x):
    layer.weight.data = layer.weight.data.clone()
    return layer(x)


def write_data(layer, x):
    layer.weight.data.copy_(layer.weight.data.clone())
    return layer(x)


@pytest.mark.parametrize("use", [replace_data, write_data])
def test_a_forward_that_adds_the_update_to_w_again_and_again_is_named(use):
    _, row = check(use)
    assert not row.ok
    assert row.merges is False
    assert "each forward changes this weight" in row.reason


@pytest.mark.parametrize("use", [replace_data, write_data])
def test_a_weight_that_a_forward_changed_comes_back(use):
    model = disha.inject_adapters(Model(use), "layer", 2)
    before = snapshot(model)
    disha.check_adapters(model, torch.randn(3, 4))
    assert_unchanged(model, before)


def test_a_forward_that_prepares_w_once_is_in_order():
    def prepare_once(layer, x):
        if not hasattr(layer, "is_prepared"):
            layer.is_prepared = True
            layer.base_weight.data.div_(2)
        return layer(x)

    _, row = check(prepare_once)
    assert row.ok


def test_few_weights_are_in_memory_twice(monkeypatch):
    monkeypatch.setattr(check_merges, "LARGEST_PART", 1)
    model = nn.Sequential(*(nn.Linear(7, 7) for _ in range(32)))
    weights = []

    def count(*_):
        tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, nn.Parameter)]
        weights.append(len({one.data_ptr() for one in tensors if one.shape == (7, 7)}))

    model.register_forward_hook(count)
    disha.inject_adapters(model, "all-linear", 2)
    report = disha.check_adapters(model, torch.randn(3, 7))
    assert report.ok, report
    assert len(weights) == 2 + 16 + 3 + 2  # a 16th of the weights is merged at a time
    assert max(weights) <= 32 + 2


def test_without_merging_the_model_runs_less():
    model = Model(lambda layer, x: layer(x))
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    disha.inject_adapters(model, "layer", 2)
    report = disha.check_adapters(model, torch.randn(3, 4), merging=False)
    assert (report.ok, report.weights[0].merges, len(runs)) == (True, None, 6)


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


def test_a_part_whose_tied_weight_is_elsewhere_can_not_be_merged(tokens):
    model = disha.inject_adapters(Tied(), "embed|q_proj", 2)
    projection = model.layers[0]["attn"].q_proj
    part = nn.Sequential(projection, model.head)
    report = disha.check_adapters(part, torch.randn(3, projection.in_features))
    assert "tied to a parameter outside this part of the model" in str(report)
    assert report.ok


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


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", METHODS)
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
    with pytest.raises(ArgumentError, match="returns no finite floating-point number"):
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


class AsksForTheClass(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) + (1.0 if type(self.layer) is nn.Linear else 0.0)


def test_a_model_that_injection_changed_is_told():
    model = disha.inject_adapters(AsksForTheClass(), "layer", 2)
    report = disha.check_adapters(model, torch.randn(3, 4))
    assert report.base_changed is True
    assert not report.ok
    assert "adapting changed the model" in str(report)
    assert type(model.layer) is not nn.Linear
    other = disha.inject_adapters(nn.Sequential(nn.Linear(4, 4)), "0", 2)
    assert disha.check_adapters(other, torch.randn(3, 4)).base_changed is False
