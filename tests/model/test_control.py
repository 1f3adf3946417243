import contextlib
import contextvars
import copy
import gc
from itertools import combinations_with_replacement

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import disha
from disha import ArgumentError, ArgumentTypeError, MergeError, ModeError
from disha.functional.routed import Route
from tests.conftest import Doubled, Made, close, flags, freshly_compiled, perturb, refused
from tests.reference import KINDS, METHODS, settings_of


@pytest.fixture
def two(model):
    disha.inject_adapters(model, "proj", 2, adapter="a")
    return perturb(disha.inject_adapters(model, "head|q_proj", 3, adapter="b", method="bat"))


class TestActive:
    def test_2000_switches_leave_nothing_behind(self, two):
        def switch(times):
            for number in range(times):
                disha.set_active_adapters(two, "ab"[number % 2])
                with disha.adapters_disabled(two), disha.adapters_active(two, "a"):
                    pass
            gc.collect()
            return len(gc.get_objects())

        before = switch(20)
        assert switch(2000) - before < 20

    def test_outputs_follow_the_active_adapters(self, two, tokens):
        outputs = {}
        for names in ((), ("a",), ("b",), ("a", "b")):
            disha.set_active_adapters(two, list(names))
            outputs[names] = two(tokens)
        for first in outputs:
            for second in outputs:
                assert torch.equal(outputs[first], outputs[second]) == (first == second)
        with disha.adapters_disabled(two):
            assert torch.equal(two(tokens), outputs[()])

    def test_flags_stay(self, two):
        before = flags(two)
        disha.set_active_adapters(two, "a")
        disha.set_adapter_scale(two, 0.0, "a")
        with disha.adapters_disabled(two):
            assert flags(two) == before
        assert flags(two) == before

    @pytest.mark.parametrize(
        ("names", "kind", "says"),
        [
            ("c", ArgumentError, "no adapter 'c'; it has 'a', 'b'"),
            (["a", "c"], ArgumentError, "no adapter 'c'"),
            ([1], ArgumentError, "no adapter 1"),
        ],
    )
    def test_refusals(self, two, names, kind, says):
        with refused(two, kind, says):
            disha.set_active_adapters(two, names)


class TestDisabled:
    def test_nests_and_survives_exceptions(self, two, tokens):
        adapted = two(tokens)
        with disha.adapters_disabled(two):
            base = two(tokens)
            with pytest.raises(KeyError), disha.adapters_disabled(two):
                raise KeyError
            assert torch.equal(two(tokens), base)
        assert torch.equal(two(tokens), adapted)
        assert not torch.equal(base, adapted)

    @pytest.mark.parametrize(
        "change",
        [
            lambda model, path: disha.inject_adapters(model, "q_proj", 2, adapter="c"),
            lambda model, path: disha.remove_adapters(model),
            lambda model, path: disha.remove_adapters(model, "a"),
            lambda model, path: disha.load_adapter(model, path, "c"),
            lambda model, path: disha.combine_adapters(model, {"a": 1.0}, into="c"),
            lambda model, path: disha.merge_adapters(model),
        ],
    )
    def test_the_adapters_stay_the_same_inside(self, two, tokens, tmp_path, change):
        disha.save_adapter(two, tmp_path / "a", "a")
        adapted = two(tokens)
        says = "inside adapters_disabled; leave it first"
        with disha.adapters_disabled(two), refused(two, ModeError, says):
            change(two, tmp_path / "a")
        assert torch.equal(two(tokens), adapted)


class TestScale:
    def test_only_the_named_adapter(self, two):
        disha.set_adapter_scale(two, np.float32(0.5), "a")
        scales = {(row.adapter, row.scale) for row in disha.summary(two).layers}
        assert scales == {("a", 0.5), ("b", 1.0)}

    @pytest.mark.parametrize(
        ("scale", "kind", "says"),
        [
            (float("nan"), ArgumentError, "must be finite and at most 3.4e\\+38, got nan"),
            (float("inf"), ArgumentError, "must be finite and at most 3.4e\\+38, got inf"),
            (1e300, ArgumentError, "must be finite and at most 3.4e\\+38, got 1e\\+300"),
            (10**400, ArgumentError, "must be finite and at most 3.4e\\+38, got 1000"),
            (np.float16("inf"), ArgumentError, "must be finite and at most 3.4e\\+38, got "),
            ("1", ArgumentTypeError, "must be a number"),
            (True, ArgumentTypeError, "must be a number"),
        ],
    )
    def test_what_is_no_scale(self, two, scale, kind, says):
        with refused(two, kind, f"scale {says}"):
            disha.set_adapter_scale(two, scale, "a")

    def test_an_unknown_adapter(self, two):
        with refused(two, ArgumentError, "no adapter 'c'"):
            disha.set_adapter_scale(two, 1.0, "c")


def test_everything_raises_while_merged(two):
    disha.merge_adapters(two)
    with refused(two, MergeError, "can't change the active adapters"):
        disha.set_active_adapters(two, "a")
    with refused(two, MergeError, "can't disable adapters"), disha.adapters_disabled(two):
        pass
    with refused(two, MergeError, "can't change an adapter's scale"):
        disha.set_adapter_scale(two, 0.5, "a")


class Several(nn.Module):
    """Every layer kind, and a linear layer that sees samples flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.flat = nn.Linear(6, 6)
        self.own = Doubled(6, 4)

    def forward(self, tokens):
        x = self.conv(self.embed(tokens).transpose(-1, -2)).transpose(-1, -2)
        x = self.flat(x.reshape(-1, 6)).view(*tokens.shape, 6)
        return self.own(x)


def several():
    model = disha.inject_adapters(Several().double(), ".", 2, adapter="a")
    disha.inject_adapters(model, "flat|own", 3, adapter="b", method="bat")
    return perturb(disha.inject_adapters(model, "embed|conv", 4, adapter="c"))


class TestRoute:
    names = ("a", None, "b", "c", "a")
    tokens = torch.arange(25).view(5, 5) % 9

    def one_by_one(self, model):
        outputs = []
        for name, sample in zip(self.names, self.tokens, strict=True):
            disha.set_active_adapters(model, [] if name is None else name)
            outputs.append(model(sample[None]))
        return torch.cat(outputs)

    def test_equals_running_the_samples_one_by_one(self):
        model = several()
        expected = self.one_by_one(model)
        for active in ("a", "c", []):
            disha.set_active_adapters(model, active)
            with disha.route_adapters(model, self.names):
                assert torch.allclose(model(self.tokens), expected, rtol=0, atol=1e-12)
        assert len({tuple(row.flatten().tolist()) for row in expected}) == 5

    @pytest.mark.parametrize(("r", "fits"), [(3, True), (2, False)])
    def test_a_view_has_all_adapters_or_none(self, r, fits):
        """The block of BAT can be cut between the halves only at a multiple of r."""

        class Halves(nn.Linear):
            def forward(self, x):
                return torch.cat(
                    [nn.functional.linear(x, half) for half in self.weight.chunk(2)], 1
                )

        model, x = nn.Sequential(Halves(6, 6, bias=False)).double(), torch.randn(2, 6).double()
        disha.inject_adapters(model, "0", r=2, adapter="a")
        perturb(disha.inject_adapters(model, "0", r=r, adapter="b", method="bat"))
        expected = []
        for name, sample in zip("ab", x.split(1), strict=True):
            disha.set_active_adapters(model, name)
            expected.append(model(sample))
        with disha.route_adapters(model, ["a", "b"]):
            if fits:
                assert torch.allclose(model(x), torch.cat(expected), rtol=0, atol=1e-12)
            else:
                with pytest.raises(ModeError, match="needs one computed weight"):
                    model(x)

    def test_gradients_reach_the_blocks_of_the_routed_adapters_only(self):
        model = several()
        with disha.route_adapters(model, ["a", None, "b", None, "a"]):
            model(self.tokens).sum().backward()
        for name, wanted in (("a", True), ("b", True), ("c", False)):
            found = [p.grad is not None for p in disha.adapter_parameters(model, name)]
            assert found == [wanted] * len(found)

    def test_nests_and_survives_exceptions(self):
        model = several()
        before = model(self.tokens)
        with disha.route_adapters(model, ["a"] * 5):
            outer = model(self.tokens)
            with pytest.raises(KeyError), disha.route_adapters(model, ["b"] * 5):
                raise KeyError
            assert torch.equal(model(self.tokens), outer)
            with disha.adapters_disabled(model):
                base = model(self.tokens)
        assert torch.equal(model(self.tokens), before)
        disha.set_active_adapters(model, [])
        assert torch.equal(model(self.tokens), base)

    def test_scale_and_flags(self):
        model = several()
        before = flags(model)
        with disha.route_adapters(model, ["a"] * 5):
            disha.set_adapter_scale(model, 0.5, "a")
            routed = model(self.tokens)
        disha.set_active_adapters(model, "a")
        assert torch.allclose(routed, model(self.tokens), rtol=0, atol=1e-12)
        assert flags(model) == before

    def test_a_copy_made_inside_is_outside(self):
        model = several()
        expected = model(self.tokens)
        with disha.route_adapters(model, ["a"] * 5):
            twin = copy.deepcopy(model)
        assert torch.equal(twin(self.tokens), expected)

    @pytest.mark.parametrize(
        ("names", "kind", "says"),
        [
            (["a", "x"], ArgumentError, "no adapter 'x'"),
            ([], ArgumentError, "is empty"),
            ([1], ArgumentError, "no adapter 1"),
        ],
    )
    def test_refusals(self, names, kind, says):
        model = several()
        with refused(model, kind, says), disha.route_adapters(model, names):
            pass

    def test_positions_that_samples_share_are_no_samples(self):
        tables = nn.ModuleDict({"tokens": nn.Embedding(9, 4), "positions": nn.Embedding(6, 4)})
        disha.inject_adapters(tables, ".", 2, init="kaiming")
        ids = torch.tensor([5, 0, 5])  # one for each sample
        with disha.route_adapters(tables, ["default", None, "default"]):
            assert tables["tokens"](ids).shape == (3, 4)
            with pytest.raises(ArgumentError, match=r"indices of shape \(6,\) are samples or posi"):
                tables["positions"](torch.arange(6))

    def test_other_adapters_do_not_matter(self):
        """Experts, layers that get sequences first, and weights that are computed."""

        def run(self, x):
            x = self.linear(x) * self.matrix.norm()
            return x + torch.einsum("nd,edo->no", x, self.experts)

        matrices = {
            "matrix": nn.Parameter(torch.ones(4, 4)),
            "experts": nn.Parameter(torch.ones(2, 4, 4)),
        }
        model = Made(run, linear=nn.Linear(4, 4), attention=nn.MultiheadAttention(4, 1), **matrices)
        disha.inject_adapters(model, "attention", 2, adapter="a")
        disha.inject_adapters(
            model,
            ".",
            2,
            adapter="b",
            init="kaiming",
            layouts={"matrix": "out in", "experts": "expert in out"},
        )
        x = torch.randn(2, 4)
        for names in (["a", None], [None, None]):
            with disha.route_adapters(model, names):
                routed = model(x)
            with disha.adapters_disabled(model):
                assert torch.equal(routed, model(x))

    @pytest.mark.parametrize("names", [["a", "b", "c"], [None] * 3])
    def test_a_wrong_number_of_names(self, names):
        model = several()
        with (
            pytest.raises(
                ArgumentError, match="3 names, but a layer got an input with the leading size 5"
            ),
            disha.route_adapters(model, names),
        ):
            model(self.tokens)

    @pytest.mark.parametrize(
        ("layer", "x"), [(nn.Linear(4, 3), torch.ones(4)), (nn.Conv1d(4, 3, 1), torch.ones(4, 5))]
    )
    def test_an_input_without_samples(self, layer, x):
        disha.inject_adapters(layer, "^$", 2)
        with (
            pytest.raises(ArgumentError, match="needs samples along the leading dimension"),
            disha.route_adapters(layer, ["default", None]),
        ):
            layer(x)

    @pytest.mark.parametrize("method", METHODS)
    def test_one_adapter_for_all_samples_is_the_same_as_without_routing(self, method):
        model = Several()
        for adapter in "ab":
            disha.inject_adapters(model, ".", 2, method=method, adapter=adapter)
        perturb(model)
        for adapter, count in (("a", 5), ("b", 1)):
            disha.set_active_adapters(model, adapter)
            with disha.route_adapters(model, [adapter] * count):
                routed = model(self.tokens)
            assert torch.equal(routed, model(self.tokens))
        with disha.route_adapters(model, [None] * 5), disha.adapters_disabled(model):
            base = model(self.tokens)
        with disha.route_adapters(model, [None] * 5):
            assert torch.equal(model(self.tokens), base)

    @pytest.mark.parametrize("gradients", [True, False])
    @pytest.mark.parametrize("rows", [1, 9])
    @pytest.mark.parametrize("methods", list(combinations_with_replacement(METHODS, 2)))
    def test_adapters_that_differ(self, methods, rows, gradients):
        layers = nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 5)).double()
        for adapter, method, target, r in zip(
            "abc", (*methods, "bone"), "01.", (2, 2, 3), strict=True
        ):
            disha.inject_adapters(layers, target, r, method=method, adapter=adapter)
        perturb(layers)
        names = ["b", "a", None, "a", "b", "c"]
        for kept in (names, [name for name in names if name != "c"]):
            x = torch.randn(len(kept), rows, 7, dtype=torch.float64)
            with torch.set_grad_enabled(gradients):
                with disha.route_adapters(layers, kept):
                    routed = layers(x)
                for name, sample, output in zip(kept, x, routed, strict=True):
                    disha.set_active_adapters(layers, [] if name is None else name)
                    assert torch.allclose(layers(sample), output, rtol=0, atol=1e-12)

    def test_an_empty_batch(self):
        model = several()
        with disha.route_adapters(model, ["a", "c"]):
            assert model(self.tokens[:0]).shape == (0, 5, 4)

    def test_blocks_of_several_sizes_on_one_weight(self):
        model = nn.MultiheadAttention(6, 2, dtype=torch.float64)
        for adapter in "ab":
            disha.inject_adapters(model, ".", 2, adapter=adapter, rank_pattern={"k_proj": 3})
        x = torch.randn(2, 6, dtype=torch.float64)
        with disha.route_adapters(perturb(model), ["a", "b"]):
            routed = nn.functional.linear(x, model.in_proj_weight)
        disha.set_active_adapters(model, "a")
        alone = nn.functional.linear(x, model.in_proj_weight)
        assert torch.allclose(alone[0], routed[0], rtol=0, atol=1e-12)

    def test_each_adapter_gets_all_its_samples_at_once(self):
        each, order = Route(("b", None, "a", "b")).by_adapter(8, torch.device("cpu"))
        found = {name: rows.tolist() for name, rows in each}
        assert (found, len(each)) == ({"b": [0, 1, 6, 7], "a": [4, 5], None: [2, 3]}, 3)
        assert order.tolist() == [0, 1, 6, 7, 2, 3, 4, 5]

    def test_neighbours_are_not_sorted(self):
        each, order = Route(("b", "b", None, "a")).by_adapter(8, torch.device("cpu"))
        assert [(name, rows.tolist()) for name, rows in each] == [
            ("b", [0, 1, 2, 3]),
            (None, [4, 5]),
            ("a", [6, 7]),
        ]
        assert order is None

    def test_compiled(self):
        layer = nn.Linear(7, 6)
        for adapter in "ab":
            disha.inject_adapters(layer, "^$", 2, adapter=adapter)
        perturb(layer)
        x = torch.randn(4, 7)
        compiled = freshly_compiled(layer)
        with disha.route_adapters(layer, ["b", None, "a", "b"]):
            assert torch.allclose(compiled(x), layer(x), atol=1e-6)

    def test_while_merged_and_merging_while_routed(self):
        model = several()
        routed = disha.route_adapters(model, self.names)
        with routed, refused(model, ModeError, "inside route_adapters"):
            disha.merge_adapters(model)
        disha.merge_adapters(model)
        with (
            pytest.raises(MergeError, match="can't route adapters"),
            disha.route_adapters(model, self.names),
        ):
            pass


@pytest.mark.parametrize("positions", [(), (3,), (2, 4)])
@pytest.mark.parametrize("kind", KINDS)
class TestRouteOfAdaptersOfOneSize:
    """All samples are computed at once, two of each name."""

    names = ("c", None, "a", "b", "c")

    def case(self, kind, positions):
        layer = nn.Linear(7, 6).double()
        for adapter in "abc":
            disha.inject_adapters(layer, "^$", 2, adapter=adapter, **settings_of(kind, 3))
        perturb(layer)
        disha.set_adapter_scale(layer, 0.5, "b")
        x = torch.randn(2 * len(self.names), *positions, 7, dtype=torch.float64)
        return layer, x

    def routed(self, layer, x):
        with disha.route_adapters(layer, self.names):
            return layer(x)

    def test_equals_running_them_one_by_one_and_so_do_gradients(self, kind, positions):
        layer, x = self.case(kind, positions)
        routed = self.routed(layer, x.requires_grad_())
        alone = []
        for name, sample in zip(self.names, x.split(2), strict=True):
            disha.set_active_adapters(layer, [] if name is None else name)
            alone.append(layer(sample))
        expected = torch.cat(alone)
        close(routed, expected, 1e-12)
        cotangent = torch.randn_like(routed)
        leaves = [x, *disha.adapter_parameters(layer)]
        found = torch.autograd.grad((routed * cotangent).sum(), leaves)
        close(found, torch.autograd.grad((expected * cotangent).sum(), leaves), 1e-12)

    def test_without_values(self, kind, positions):
        layer, x = self.case(kind, positions)
        assert self.routed(layer.to("meta"), x.to("meta")).is_meta

    def test_mapped_over_a_block(self, kind, positions):
        layer, x = self.case(kind, positions)
        [(key, block)] = [item for item in layer.named_parameters() if ".a." in item[0]]

        def run(block):
            return torch.func.functional_call(layer, {key: block}, (x,))

        with torch.no_grad(), disha.route_adapters(layer, self.names):
            mapped = torch.func.vmap(run)(block[None])
            close(mapped[0], layer(x), 1e-12)

    @pytest.mark.parametrize(
        ("fraction", "slab"),
        [(0.0, 2**22), (1e6, 2**22), (1e6, 1)],
        ids=["a product per adapter", "W read once", "a product for each r outputs"],
    )
    def test_in_each_way_of_bat(self, kind, positions, fraction, slab, monkeypatch):
        layer, x = self.case(kind, positions)
        expected = self.routed(layer, x)
        monkeypatch.setattr("disha.functional.bat.STREAMED_FRACTION", fraction)
        monkeypatch.setattr("disha.functional.bat.SLAB_BYTES", slab)
        with torch.no_grad():
            close(self.routed(layer, x), expected, 1e-12)


def test_a_layer_that_is_put_into_the_model_later_obeys_its_contexts():
    model = disha.inject_adapters(nn.Sequential(nn.Linear(4, 4)), "0", 2, init="kaiming")
    model.append(disha.BoneLinear(4, 4, r=2, init="kaiming"))
    x = torch.randn(3, 4)
    with disha.adapters_disabled(model):
        inner = F.linear(x, model[0].base_weight, model[0].bias)
        assert torch.equal(model(x), F.linear(inner, model[1].base_weight, model[1].bias))


def test_a_context_of_one_model_leaves_another_one_alone():
    one, other = (
        disha.inject_adapters(nn.Sequential(nn.Linear(4, 4)), "0", 2, init="kaiming")
        for _ in range(2)
    )
    x = torch.randn(3, 4)
    expected = other(x)
    with disha.adapters_disabled(one):
        assert torch.equal(other(x), expected)
        with disha.adapters_active(one, "default"):
            assert torch.equal(other(x), expected)


def test_a_context_opens_without_a_walk(monkeypatch):
    model = disha.inject_adapters(nn.Sequential(nn.Linear(4, 4)), "0", 2)
    gc.collect()  # of other models, whose layers might be in this one
    monkeypatch.setattr("disha.model.control.ModelView", None)
    with disha.adapters_active(model, "default"), disha.adapters_disabled(model):
        model(torch.randn(3, 4))


class TestStreams:
    """A plain generator has no context variables of its own: those of its caller hold."""

    @pytest.fixture
    def model(self):
        model = nn.Sequential(nn.Linear(4, 4))
        for name in "ab":
            disha.inject_adapters(model, "0", 2, adapter=name, init="kaiming")
        return model

    @pytest.fixture
    def which(self, model):
        """Return a function that tells which adapter acts."""
        x = torch.randn(1, 4)
        outputs = {}
        for name in ("a", "b", ()):
            with disha.adapters_active(model, name):
                outputs[name] = model(x)
        return lambda: next(name for name in outputs if torch.equal(outputs[name], model(x)))

    @pytest.fixture
    def stream(self, model, which):
        def stream(name):
            with disha.adapters_active(model, name):
                for _ in range(3):
                    yield which()

        return stream

    def test_one_that_is_read_in_one_context_is_right(self, stream):
        assert list(stream("a")) == ["a"] * 3

    def test_one_that_is_resumed_in_a_copy_of_the_context_is_refused(self, stream):
        steps = stream("a")
        assert contextvars.copy_context().run(next, steps) == "a"
        with pytest.raises(ModeError, match=r"goes on after a `yield` inside `with adapters_act"):
            contextvars.copy_context().run(next, steps)

    def test_of_two_that_take_turns_the_first_is_refused(self, stream):
        one, other = stream("a"), stream("b")
        assert (next(one), next(other), next(other)) == ("a", "b", "b")
        with pytest.raises(ModeError, match="open for each step"):
            next(one)

    def test_a_context_that_opens_for_each_step_serves_a_stream(self, model, which):
        def stream(count):
            for _ in range(count):
                sent = yield which()
            return sent

        both = [disha.adapters_active(model, name)(stream)(3) for name in "ab"]
        turns = [
            contextvars.copy_context().run(steps.send, None) for _ in range(3) for steps in both
        ]
        assert turns == ["a", "b"] * 3
        with pytest.raises(StopIteration) as end:
            both[0].send("last")
        assert end.value.value == "last"

    def test_contexts_inside_a_generator_nest(self, model, which, stream):
        @contextlib.contextmanager
        def active(name):
            with disha.adapters_active(model, name):
                yield

        def outer():
            with disha.adapters_active(model, "a"):
                with active("b"):
                    yield which()
                yield which()
                yield from stream("b")
                yield which()

        assert list(outer()) == ["b", "a", "b", "b", "b", "a"]
        with active("a"):
            assert list(stream("b")) == ["b"] * 3
            assert which() == "a"

    def test_a_decorated_function_runs_inside_a_generator(self, model, which):
        def outer():
            with disha.adapters_active(model, "a"):
                yield disha.adapters_active(model, "b")(which)()
                yield from disha.adapters_active(model, "b")(lambda: (which() for _ in "12"))()

        assert list(outer()) == ["b", "a", "a"]

    def test_a_checkpointed_layer_in_a_generator_is_computed_again_as_it_was(self, model):
        def losses():
            with disha.adapters_active(model, "a"):
                x = torch.randn(2, 4, requires_grad=True)
                checkpoint(model, x, use_reentrant=False).sum().backward()
                yield x.grad

        assert all(gradient.any() for gradient in losses())


class TestWhatCanBeRouted:
    def test_an_adapter_whose_name_had_experts_before(self):
        model = nn.ModuleDict({"experts": nn.Bilinear(4, 4, 4), "linear": nn.Linear(4, 4)})
        disha.inject_adapters(model, "experts", 2)
        disha.remove_adapters(model)
        disha.inject_adapters(model, "linear", 2)
        with disha.route_adapters(model, ["default"]):
            model["linear"](torch.randn(1, 4))

    def test_one_of_a_part_is_refused_for_what_is_beside_it(self):
        model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "mlp": nn.Linear(4, 4)})
        disha.inject_adapters(model, "attention", 2, adapter="a")
        disha.inject_adapters(model["mlp"], "", 2, adapter="b")
        gc.collect()
        with pytest.raises(ArgumentError, match="attention has batch_first=False"):
            disha.route_adapters(model, ["b", "b"]).__enter__()
