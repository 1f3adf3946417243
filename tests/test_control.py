import pytest
import torch
from torch import nn

import disha
from disha import ArgumentError, ArgumentTypeError, MergeError
from tests.conftest import assert_unchanged, perturb, snapshot


@pytest.fixture
def two(model):
    disha.inject_adapters(model, "proj", 2, adapter="a")
    disha.inject_adapters(model, "head|q_proj", 3, adapter="b", method="bat")
    perturb(model)
    return model


def flags(model):
    return {name: p.requires_grad for name, p in model.named_parameters()}


class TestActive:
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

    def test_order_never_matters(self):
        model = nn.Linear(6, 4).double()
        disha.inject_adapters(model, "all-linear", 2, adapter="a", method="bat")
        disha.inject_adapters(model, "all-linear", 3, adapter="b", method="bat")
        perturb(model)
        x = torch.randn(5, 6, dtype=torch.float64)
        disha.set_active_adapters(model, ["a", "b"])
        forwards = model(x)
        disha.set_active_adapters(model, ["b", "a"])
        assert torch.allclose(model(x), forwards, rtol=0, atol=1e-13)

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
            (["a", "a"], ArgumentError, "twice"),
            (None, ArgumentTypeError, "got None"),
            ([1], ArgumentTypeError, "list of names"),
        ],
    )
    def test_refusals(self, two, names, kind, says):
        before = snapshot(two)
        with pytest.raises(kind, match=says):
            disha.set_active_adapters(two, names)
        assert_unchanged(two, before)


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

    def test_an_adapter_that_is_added_inside_stays_off_until_the_end(self, two, tokens):
        with disha.adapters_disabled(two):
            base = two(tokens)
            disha.inject_adapters(two, "q_proj", 2, adapter="c", init="kaiming")
            assert torch.equal(two(tokens), base)
        assert not torch.equal(two(tokens), base)

    def test_backward_of_a_forward_before(self, two, tokens):
        adapted = two(tokens)
        with torch.no_grad(), disha.adapters_disabled(two):
            reference = two(tokens)
        (adapted - reference).square().sum().backward()
        assert all(p.grad is not None for p in disha.adapter_parameters(two, "b"))


class TestScale:
    @pytest.mark.parametrize("method", ["bone", "bat"])
    def test_scales_the_update_linearly(self, method):
        model = nn.Linear(6, 4).double()
        x = torch.randn(5, 6, dtype=torch.float64)
        base = model(x)
        disha.inject_adapters(model, "all-linear", 3, method=method)
        perturb(model)
        full = model(x) - base
        for scale in (0.0, 0.3, -1.0, 2.5):
            disha.set_adapter_scale(model, scale)
            assert torch.allclose(model(x) - base, scale * full, rtol=0, atol=1e-12)

    def test_only_the_named_adapter(self, two):
        disha.set_adapter_scale(two, 0.5, "a")
        scales = {(row.adapter, row.scale) for row in disha.summary(two).layers}
        assert scales == {("a", 0.5), ("b", 1.0)}

    @pytest.mark.parametrize(
        ("scale", "adapter", "kind"),
        [
            (float("nan"), "a", ArgumentError),
            (float("inf"), "a", ArgumentError),
            ("1", "a", ArgumentTypeError),
            (1.0, "c", ArgumentError),
        ],
    )
    def test_refusals(self, two, scale, adapter, kind):
        before = snapshot(two)
        with pytest.raises(kind):
            disha.set_adapter_scale(two, scale, adapter)
        assert_unchanged(two, before)


def test_everything_raises_while_merged(two):
    disha.merge_adapters(two)
    before = snapshot(two)
    with pytest.raises(MergeError, match="can't change the active adapters"):
        disha.set_active_adapters(two, "a")
    with pytest.raises(MergeError, match="can't disable adapters"), disha.adapters_disabled(two):
        pass
    with pytest.raises(MergeError, match="can't change an adapter's scale"):
        disha.set_adapter_scale(two, 0.5, "a")
    assert_unchanged(two, before)
