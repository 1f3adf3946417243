"""Modules that make adapting hard: guarded, slotted, lazy, on meta, compiled, parametrised."""

import copy
from types import MappingProxyType

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import disha
from disha import ArgumentError, TargetError
from tests.conftest import (
    Layered,
    assert_unchanged,
    freshly_compiled,
    perturb,
    refused,
    seed_torch,
    snapshot,
)
from tests.every_pair import Case, DtypeTests, PairTests, every_kind, indices, numbers
from tests.reference import METHODS


class Sealed(nn.Linear):
    """Refuses to have any attribute set once it is built, its class included."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.__dict__["sealed"] = True

    def __setattr__(self, name, value):
        if self.__dict__.get("sealed") and name != "training":
            raise AttributeError(f"{name} is read-only")
        super().__setattr__(name, value)

    def __delattr__(self, name):
        raise AttributeError(f"{name} is read-only")


class ReadOnlySizes(nn.Linear):
    """Its sizes are properties without a setter."""

    def __init__(self, in_features: int, out_features: int) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.randn(out_features))

    @property
    def in_features(self):
        return self.weight.shape[1]

    @property
    def out_features(self):
        return self.weight.shape[0]


class Slotted(nn.Linear):
    """Has a slot beside its __dict__."""

    __slots__ = ("gain",)

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gain = 2.0

    def forward(self, input):
        return super().forward(input) * self.gain


class GuardedDict(nn.Linear):
    """Shows its attributes, and does not let them be changed through __dict__."""

    @property
    def __dict__(self):
        return MappingProxyType(nn.Module.__dict__["__dict__"].__get__(self))


class Positions(nn.Embedding):
    """Looks positions up, whatever the tokens are that it is called with."""

    def forward(self, tokens, start=0):
        return self.weight[start : start + tokens.shape[1]]


class Shifted(nn.Embedding):
    """Looks up what it is called with, by way of torch's forward."""

    def forward(self, input):
        return super().forward(input + 2) * self.weight.shape[0]


HARD = {
    cls.__name__: Case(lambda cls=cls: cls(6, 4), numbers(5, 6), kinds=METHODS)
    for cls in (Sealed, ReadOnlySizes, Slotted, GuardedDict)
} | {
    cls.__name__: Case(lambda cls=cls: cls(9, 4), indices(7, 2, 3), kinds=("bone",))
    for cls in (Positions, Shifted)
}
HARD_PAIRS = every_kind(HARD)


@pytest.mark.parametrize("dtype", [torch.float64])
@pytest.mark.parametrize(("name", "kind"), HARD_PAIRS)
class TestGuardedLayersAndForwardsOfTheirOwn(DtypeTests):
    table = HARD


@pytest.mark.parametrize(("name", "kind"), HARD_PAIRS)
class TestTraining:
    table = HARD
    test_gradients = PairTests.test_gradients_are_those_of_the_dense_weight


def test_dropout_that_could_not_act_is_refused():
    model = disha.inject_adapters(nn.Sequential(Positions(9, 4)), ".", 2, dropout=0.1)
    with pytest.raises(disha.ModeError, match=r"dropout can't act here.*dropout=0"):
        model(torch.zeros(2, 3, dtype=torch.int64))
    model.eval()(torch.zeros(2, 3, dtype=torch.int64))


def test_a_slot_survives_adapting_and_removal():
    layer = Slotted(4, 3)
    layer.gain = 3.0
    disha.inject_adapters(layer, "^$", 2)
    assert layer.gain == 3.0
    disha.remove_adapters(layer)
    assert (layer.gain, type(layer)) == (3.0, Slotted)


class FixedClass(nn.Linear):
    """Its instances can't change their class."""

    @property
    def __class__(self):
        return FixedClass

    @__class__.setter
    def __class__(self, value):
        raise TypeError("the class is fixed")


class Tagged(nn.Linear):
    """Its subclasses need an argument."""

    def __init_subclass__(cls, *, tag, **options):
        super().__init_subclass__(**options)


@pytest.mark.parametrize(
    ("kind", "says"), [(FixedClass, "the class is fixed"), (Tagged, "argument: 'tag'.*exclude=")]
)
def test_a_class_that_can_not_change_or_be_derived_from_is_refused(kind, says):
    model = nn.Sequential(nn.Linear(4, 4), kind(4, 3))
    with refused(model, ArgumentError, f"{kind.__name__} can't be adapted.*{says}"):
        disha.inject_adapters(model, "all-linear", 2)


class TestLazy:
    def model(self):
        seed_torch(0)
        return nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.Linear(5, 3))

    def test_all_linear_says_what_to_do_and_changes_nothing(self):
        model = self.model()
        with pytest.raises(
            TargetError, match=r"0: its weight is not initialised yet; run the model once"
        ):
            disha.inject_adapters(model, "^0$", 2)
        assert type(model[0]) is nn.LazyLinear

    def test_once_it_has_run_it_is_a_layer_like_any_other(self, tmp_path):
        model, x = self.model(), torch.randn(2, 4)
        base = model(x)
        disha.inject_adapters(model, "all-linear", 2)
        assert torch.equal(model(x), base)
        assert [row.name for row in disha.summary(model).layers] == ["0", "2"]
        disha.remove_adapters(model)
        assert type(model[0]) is nn.Linear

    def test_beside_an_adapted_layer_it_can_still_come_to_life(self):
        model, x = self.model(), torch.randn(2, 4)
        plan = disha.plan_adapters(model, "all-linear", 2)
        assert [s.name for s in plan.skipped] == ["0"]
        perturb(disha.inject_adapters(model, "all-linear", 2))
        output = model(x)
        assert not model[0].weight.requires_grad
        assert type(model[0]) is nn.Linear
        with disha.adapters_disabled(model):
            assert not torch.equal(model(x), output)
        disha.remove_adapters(model)
        assert all(p.requires_grad for p in model.parameters())


class TestMeta:
    """Injected before the weights are there, as large models are built."""

    @pytest.mark.parametrize("method", METHODS)
    def test_weights_and_adapter_come_later(self, method, tokens, tmp_path):
        trained = Layered()
        perturb(disha.inject_adapters(trained, "all-linear", 2, method=method, scale=0.5))
        disha.save_adapter(trained, tmp_path / "a")
        with torch.device("meta"):
            model = Layered()
        disha.inject_adapters(model, "all-linear", 2, method=method, scale=0.5)
        assert all(p.is_meta for p in model.parameters())
        model.to_empty(device="cpu")
        base = {k: v for k, v in trained.state_dict().items() if ".disha." not in k}
        model.load_state_dict(base)
        disha.load_adapter(model, tmp_path / "a", replace=True)
        assert torch.equal(model(tokens), trained(tokens))
        compiled = torch.compile(model, backend="eager")
        assert torch.allclose(compiled(tokens), trained(tokens), atol=1e-6)

    def test_weights_assigned_later(self, tokens):
        trained = disha.inject_adapters(Layered(), "all-linear", 2, init="kaiming")
        with torch.device("meta"):
            model = Layered()
        disha.inject_adapters(model, "all-linear", 2)
        model.load_state_dict(trained.state_dict(), assign=True)
        assert torch.equal(model(tokens), trained(tokens))
        compiled = torch.compile(model, backend="eager")
        assert torch.allclose(compiled(tokens), trained(tokens), atol=1e-6)

    def test_merging_without_weights_is_refused(self):
        with torch.device("meta"):
            model = Layered()
        disha.inject_adapters(model, "all-linear", 2)
        before = snapshot(model)
        with pytest.raises(
            disha.MergeError, match=r"\(meta device\); give the model its values first"
        ):
            disha.merge_adapters(model)
        assert snapshot(model)["objects"] == before["objects"]
        assert not any(merged for _, _, merged in snapshot(model)["active"].values())


def compiled_whole(model):
    return torch.compile(model, backend="eager")


def compiled_inside(model):
    model.layers[0]["attn"] = torch.compile(model.layers[0]["attn"], backend="eager")
    return model


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def twice(model):
    return compiled_whole(compiled_inside(model))


@pytest.mark.parametrize("wrap", [compiled_whole, compiled_inside, compiled_in_place, twice])
class TestCompiled:
    names = (
        "layers.0.attn.q_proj",
        "layers.0.attn.v_proj",
        "layers.1.attn.q_proj",
        "layers.1.attn.v_proj",
    )

    @pytest.fixture(autouse=True)
    def _fresh_graphs(self):
        torch._dynamo.reset()

    def plain(self):
        seed_torch(0)
        return Layered()

    def adapted(self):
        return perturb(disha.inject_adapters(self.plain(), "attn", 2, also_train="norm.weight"))

    def test_before_injection(self, wrap, tokens, tmp_path):
        model = wrap(self.plain())
        before = model(tokens)
        disha.inject_adapters(model, r"^layers\.\d\.attn", 2, also_train=r"attn\.norm\.weight$")
        assert torch.equal(model(tokens), before)
        perturb(model)
        assert torch.allclose(model(tokens), self.adapted()(tokens), atol=1e-6)
        disha.save_adapter(model, tmp_path / "compiled")
        self.assert_clean(tmp_path / "compiled")

    def test_dropout_acts_in_training_only(self, wrap, tokens):
        model = perturb(disha.inject_adapters(self.plain(), "attn", 2, dropout=0.5))
        plain, model = copy.deepcopy(model).eval(), wrap(model)
        assert not torch.equal(model(tokens), model(tokens))
        assert torch.allclose(model.eval()(tokens), plain(tokens), atol=1e-6)
        assert not torch.equal(model.train()(tokens), plain(tokens))

    def test_after_injection(self, wrap, tokens, tmp_path):
        model = wrap(self.adapted())
        assert torch.allclose(model(tokens), self.adapted()(tokens), atol=1e-6)
        model(tokens).square().mean().backward()
        assert all(p.grad.abs().sum() > 0 for p in disha.adapter_parameters(model))
        disha.save_adapter(model, tmp_path / "compiled")
        self.assert_clean(tmp_path / "compiled")
        disha.save_adapter(self.adapted(), tmp_path / "plain")
        assert (tmp_path / "compiled").read_bytes() == (tmp_path / "plain").read_bytes()

    def test_a_file_goes_in_and_the_adapter_comes_out(self, wrap, tokens, tmp_path):
        disha.save_adapter(self.adapted(), tmp_path / "a")
        model = wrap(self.plain())
        base = model(tokens)
        disha.load_adapter(model, tmp_path / "a")
        expected = self.adapted()(tokens)
        assert torch.allclose(model(tokens), expected, atol=1e-6)
        disha.merge_adapters(model)
        assert torch.allclose(model(tokens), expected, atol=1e-6)
        disha.unmerge_adapters(model)
        disha.remove_adapters(model)
        assert torch.equal(model(tokens), base)

    def assert_clean(self, path):
        file = disha.inspect_adapter(path)
        assert tuple(layer.name for layer in file.layers) == self.names
        assert set(file.also_train) == {f"layers.{i}.attn.norm.weight" for i in (0, 1)}


PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}
LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 5, 5)),
    "embedding": (lambda: nn.Embedding(7, 4), None),
}
CASES = [
    ("linear", "bone", "weight_norm", True),
    ("linear", "bone", "spectral_norm", False),
    ("linear", "bone", "orthogonal", True),
    ("linear", "bat", "weight_norm", False),
    ("linear", "bat", "spectral_norm", True),
    ("linear", "bat", "orthogonal", False),
    ("conv2d", "bone", "weight_norm", True),
    ("conv2d", "bone", "spectral_norm", False),
    ("conv2d", "bone", "orthogonal", True),
    ("embedding", "bone", "weight_norm", False),
    ("embedding", "bone", "spectral_norm", True),
    ("embedding", "bone", "orthogonal", False),
]
"""Layer, method, parametrization, and whether in training."""


@pytest.mark.parametrize(("layer", "method", "how", "training"), CASES)
class TestParametrised:
    """The weight is computed anew each time it is read, and spectral_norm then takes a step of its
    own in training: reading it more often than the plain layer does would change the model."""

    def make(self, layer, how, training):
        seed_torch(0)
        build, _ = LAYERS[layer]
        model = nn.Sequential(PARAMETRIZATIONS[how](build())).double()
        return model.train(training)

    def input(self, layer):
        shape = LAYERS[layer][1]
        if shape is None:
            return torch.tensor([[1, 2, 6], [0, 3, 3]])
        return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def test_planning_and_injecting_change_nothing(self, layer, method, how, training):
        model, plain = self.make(layer, how, training), self.make(layer, how, training)
        before = snapshot(model)
        disha.plan_adapters(model, ".", 2, method=method)
        assert_unchanged(model, before)
        disha.inject_adapters(model, "^0$", 2, method=method)
        x = self.input(layer)
        for _ in range(3):
            assert torch.equal(model(x), plain(x))
        base = {k: v for k, v in model.state_dict().items() if ".disha." not in k}
        assert all(torch.equal(base[key], value) for key, value in plain.state_dict().items())

    def test_the_update_is_that_of_the_computed_weight(self, layer, method, how, training):
        model, plain = self.make(layer, how, training), self.make(layer, how, training)
        perturb(disha.inject_adapters(model, "^0$", 2, method=method))
        x = self.input(layer)
        output = model(x)
        weight = plain[0].weight.detach()
        # by a layer of the same class with that very weight
        dense = LAYERS[layer][0]().double()
        with torch.no_grad():
            dense.weight.copy_(weight)
            if getattr(dense, "bias", None) is not None:
                dense.bias.copy_(plain[0].bias)
        perturb(disha.inject_adapters(dense, "^$", 2, method=method))
        assert torch.allclose(output, dense(x), rtol=0, atol=1e-10)

    def test_compiled_is_eager(self, layer, method, how, training):
        models = [self.make(layer, how, training) for _ in range(2)]
        for model in models:
            perturb(disha.inject_adapters(model, "^0$", 2, method=method))
        compiled, x = freshly_compiled(models[0]), self.input(layer)
        for _ in range(2):
            assert torch.allclose(compiled(x), models[1](x), rtol=0, atol=1e-10)

    def test_trains_saves_loads_and_goes(self, layer, method, how, training, tmp_path):
        model, x = self.make(layer, how, training), self.input(layer)
        before = snapshot(model.eval())
        base = model(x)
        disha.inject_adapters(model.train(training), "^0$", 2, method=method)
        model(x).square().sum().backward()
        (block,) = disha.adapter_parameters(model)
        assert block.grad.abs().sum() > 0
        perturb(model)
        values = {k: v.clone() for k, v in model.state_dict().items()}
        disha.save_adapter(model, tmp_path / "a")
        with refused(model, disha.MergeError, "computed from other parameters"):
            disha.merge_adapters(model)
        fresh = self.make(layer, how, training)
        fresh.load_state_dict({k: v for k, v in values.items() if ".disha." not in k})
        disha.load_adapter(fresh, tmp_path / "a")
        assert torch.equal(fresh.eval()(x), model.eval()(x))
        disha.remove_adapters(model)
        if how != "spectral_norm":  # which has taken steps in training
            assert_unchanged(model, before)
            assert torch.equal(model(x), base)
        assert type(model[0]).__name__.startswith("Parametrized")


@pytest.mark.parametrize("how", PARAMETRIZATIONS)
def test_a_parametrization_is_refused_under_an_adapter_that_acts(how):
    model, x = disha.inject_adapters(nn.Sequential(nn.Linear(6, 4)), "0", 2), torch.randn(3, 6)
    with refused(model, ArgumentError, "an adapted weight can't be parametrized.*adapt the layer"):
        PARAMETRIZATIONS[how](model[0])
    model = nn.Sequential(PARAMETRIZATIONS[how](nn.Linear(6, 4)))
    assert disha.check_adapters(disha.inject_adapters(model, "0", 2), x).ok


def test_looking_for_tied_heads_takes_no_step_of_training():
    table = parametrizations.spectral_norm(nn.Embedding(6, 4))
    model = nn.Sequential(table, nn.Linear(4, 6, bias=False))
    before = snapshot(model)
    plan = disha.plan_adapters(model, "all-linear", 2)
    assert_unchanged(model, before)
    assert [layer.name for layer in plan.layers] == ["1"]


@pytest.mark.parametrize("how", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_weight_computed_by_a_hook(how, method):
    """The old weight_norm and spectral_norm set a plain tensor as the weight before each call."""
    model, x = nn.Sequential(how(nn.Linear(6, 4))).double().eval(), torch.randn(3, 6).double()
    base, before = model(x), snapshot(model)
    disha.inject_adapters(model, "^0$", 2, method=method)
    assert torch.equal(model(x), base)
    perturb(model)
    dense = model[0].base_weight + model[0].delta_weight(model[0].disha["default"])
    assert torch.allclose(model(x), F.linear(x, dense, model[0].bias))
    with pytest.raises(disha.MergeError, match="computed from other parameters"):
        disha.merge_adapters(model)
    disha.remove_adapters(model)
    assert_unchanged(model, before)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_the_old_weight_norm_can_be_removed_under_an_adapter():
    model, x = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 4))).double(), torch.randn(3, 6)
    perturb(disha.inject_adapters(model, "^0$", 2))
    expected = model(x.double())
    nn.utils.remove_weight_norm(model[0])
    assert torch.allclose(model(x.double()), expected)


def _with_old_weight_norm(model):
    nn.utils.weight_norm(model[0])
    return model


def _pruned(model):
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("change", [_with_old_weight_norm, _pruned])
def test_a_hook_that_computes_the_weight_under_an_adapter(change, tmp_path):
    x = torch.randn(3, 6).double()
    model = perturb(disha.inject_adapters(nn.Sequential(nn.Linear(6, 4)).double(), "0", 2))
    base = {k: v.clone() for k, v in model.state_dict().items() if ".disha." not in k}
    expected = model(x)
    change(model)
    if change is _with_old_weight_norm:
        torch.testing.assert_close(model(x), expected)
    disha.save_adapter(model, tmp_path / "adapter")
    fresh = nn.Sequential(nn.Linear(6, 4)).double()
    fresh.load_state_dict(base)
    disha.load_adapter(change(fresh), tmp_path / "adapter")
    torch.testing.assert_close(fresh(x), model(x))
    disha.inject_adapters(model, "0", 2, adapter="b")
    assert disha.check_adapters(model, x).ok


def test_pruning_under_an_adapter_prunes_w():
    model = perturb(disha.inject_adapters(nn.Sequential(nn.Linear(6, 4)).double(), "^0$", 2))
    layer, x = model[0], torch.randn(3, 6).double()
    base, delta = layer.base_weight.clone(), layer.delta_weight(layer.disha["default"])
    for _ in range(2):
        prune.l1_unstructured(layer, "weight", 0.5)
        expected = F.linear(x, base * layer.weight_mask + delta, layer.bias)
        torch.testing.assert_close(model(x), expected)
    prune.remove(layer, "weight")
    torch.testing.assert_close(model(x), expected)
    assert disha.check_adapters(model, x).ok


@pytest.mark.parametrize("trace", [False, True])
def test_a_scripted_part_stays_as_it_is(trace, tmp_path):
    x = torch.randn(6, 4)

    def build():
        seed_torch(0)
        part = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        part = torch.jit.trace(part, x) if trace else torch.jit.script(part)
        return nn.Sequential(nn.Linear(4, 4), part, nn.Linear(4, 4))

    model = disha.inject_adapters(build(), "all-linear", 2, also_train=r"1\.1")
    assert not model.get_parameter("1.0.weight").requires_grad
    perturb(model)(x)  # changes the running statistics
    disha.save_adapter(model, tmp_path / "adapter")
    again = build()
    disha.load_adapter(again, tmp_path / "adapter")
    expected = model.eval()(x)
    assert torch.equal(again.eval()(x), expected)
    disha.merge_adapters(again)
    torch.testing.assert_close(again(x), expected)
    assert disha.remove_adapters(model).get_parameter("1.0.weight").requires_grad
