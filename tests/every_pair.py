"""What holds for every adapted module and every kind of block, against the oracle's dense weights.

A table has a `Case` for each module. `tests/layers/test_layouts.py` has one for each layout, and
`tests/layers/test_kinds.py` one for each kind of layer. `DtypeTests` and `PairTests` are the tests
of all cases: a class that inherits them names its table, and parametrizes name, kind and dtype.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import disha
from disha import ArgumentError, ModeError
from disha.layers.weights import base_of
from disha.model.view import ModelView
from tests import reference
from tests.conftest import assert_unchanged, perturb, pickled, seed_torch, snapshot
from tests.reference import KINDS, method_of_kind, settings_of

NO_TILE = tuple(kind for kind in KINDS if kind != "tile")
"""The kinds for weights whose numbers of outputs have no common divisor."""

LIMITS = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 0.06,
    torch.float16: 0.02,
    torch.complex64: 1e-5,
}
"""The largest error of an output in each dtype, relative to the largest value."""


def numbers(*shape: int) -> torch.Tensor:
    """Return random numbers for an input, the same in every run."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def indices(below: int, *shape: int) -> torch.Tensor:
    """Return random indices for an input, the same in every run."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(below, shape, generator=generator)


def call_module(module: nn.Module, x: torch.Tensor) -> Any:
    return module(x)


@dataclass(frozen=True)
class Case:
    """A module with an adapted weight, and an input for it.

    Attributes:
        make: makes the module.
        x: the input: numbers, or indices.
        kinds: the kinds of blocks that the weight can have.
        settings: those of `inject_adapters` beyond the kind and r.
        call: runs the module, with more arguments than the input if it needs them.
        routing_error: what the error says where samples can't be routed; None if they can.
        has_own_product: whether dW has a product of its own, which rounds differently.
        is_one_graph: whether torch compiles and exports the plain module as one graph.
    """

    make: Callable[[], nn.Module]
    x: torch.Tensor
    kinds: tuple[str, ...] = KINDS
    settings: Mapping[str, Any] = field(default_factory=dict)
    call: Callable[[nn.Module, torch.Tensor], Any] = call_module
    routing_error: str | None = None
    has_own_product: bool = False
    is_one_graph: bool = True

    @property
    def looks_up(self) -> bool:
        return not self.x.is_floating_point()

    def plain(self, dtype=torch.float64):
        """Return a new model of the module, with the same values at every call."""
        seed_torch(0)
        model = nn.Sequential(self.make()).to(torch.float32 if dtype.is_complex else dtype)
        if dtype.is_complex:
            make_complex(model, dtype)
        return model

    def adapted(self, kind, dtype=torch.float64, **settings):
        return self.adapt(self.plain(dtype), r=2, **settings_of(kind, 2), **settings)

    def adapt(self, model, **settings):
        """Add an adapter to a model of this case."""
        return disha.inject_adapters(model, **{"target_regex": "^0", **self.settings, **settings})

    def input(self, dtype=torch.float64):
        if self.looks_up:
            return self.x
        if dtype.is_complex:
            return torch.complex(self.x, self.x.flip(-1)).to(dtype)
        return self.x.to(dtype)

    def output(self, model, x):
        output = self.call(model[0], x)
        return output[0] if isinstance(output, tuple) else output


def make_complex(model, dtype):
    """Give every parameter an imaginary part, which is its values in reverse."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            values = parameter.detach()
            complex_values = torch.complex(values, values.flatten().flip(0).view_as(values))
            setattr(module, name, nn.Parameter(complex_values.to(dtype)))


def every_kind(cases: Mapping[str, Case]) -> list[tuple[str, str]]:
    """Return (name, kind) of each case with each of its kinds."""
    return [(name, kind) for name, case in cases.items() for kind in case.kinds]


def one_kind_each(cases: Mapping[str, Case], first: int = 0) -> list[tuple[str, str]]:
    """Return (name, kind) of each case once; the kinds take turns, from the first on."""
    turns = itertools.cycle([*KINDS[first:], *KINDS[:first]])
    pairs = []
    for name, case in cases.items():
        kind = next(turns)
        while kind not in case.kinds:
            kind = next(turns)
        pairs.append((name, kind))
    return pairs


# --- the oracle ----------------------------------------------------------------------------------


def exact(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the oracle computes."""
    return torch.complex128 if dtype.is_complex else torch.float64


def close(actual, expected, dtype=torch.float64):
    """Compare tensors of one dtype with the limit of `dtype`, relative to the largest value."""
    assert actual.dtype == expected.dtype
    wide = exact(expected.dtype)
    limit = LIMITS[dtype] * max(1.0, float(expected.detach().to(wide).abs().max()))
    assert (actual.to(wide) - expected.to(wide)).abs().max() <= limit


def updates(adapted, adapter="default", blocks: Mapping[str, torch.Tensor] | None = None):
    """Return parameter name -> dW by the oracle, of an adapter's blocks or of other values."""
    module_names = {module: name for name, module in adapted.named_modules()}
    deltas: dict[str, torch.Tensor] = {}
    for name, layer, _, block in ModelView(adapted).blocks(adapter):
        slot = block.spec
        base = base_of(layer, slot).detach()
        base = base.to(exact(base.dtype))
        values = block.block.detach().to(base.dtype) if blocks is None else blocks[name]
        delta = reference.layout_delta_weight(
            block.method.name,
            slot.layout.pattern,
            values,
            base,
            slot.outputs,
            slot.layout.groups,
            slot.layout.padding_idx,
        )
        key = f"{module_names[layer]}.{slot.parameter}"
        deltas[key] = deltas[key] + delta if key in deltas else delta
    return deltas


def add_updates(plain, deltas: Iterable[Mapping[str, torch.Tensor]], scale=1.0):
    """Add updates to the weights of a plain model, and return it."""
    with torch.no_grad():
        for by_parameter in deltas:
            for key, delta in by_parameter.items():
                plain.get_parameter(key).add_(delta * scale)
    return plain


def dense(case, adapted, dtype, scale=1.0):
    """Return the plain model, as exact as the oracle, with the updates in its weights."""
    plain = case.plain(dtype)
    for parameter in plain.parameters():
        parameter.data = parameter.data.to(exact(dtype))
    return add_updates(plain, [updates(adapted)], scale)


def output_with(case, plain, parameters: Mapping[str, torch.Tensor], x):
    """Return the output of a plain model with other values of its parameters."""
    if isinstance(plain[0], nn.RNNBase):
        # torch's recurrent layers keep a list of their weights, which functional_call misses.
        for key, value in parameters.items():
            name = key.removeprefix("0.")
            plain[0]._parameters.pop(name)
            place = plain[0]._flat_weights_names.index(name)
            plain[0]._flat_weights[place] = value
        return case.output(plain, x)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = plain

        def forward(self, x):
            return case.output(self.model, x)

    named = {f"model.{key}": value for key, value in parameters.items()}
    return torch.func.functional_call(Whole(), named, (x,))


# --- the tests -----------------------------------------------------------------------------------


class DtypeTests:
    """What holds in every dtype; a class of tests names its table, and parametrizes all three."""

    table: ClassVar[dict[str, Case]]
    merges: ClassVar[int] = 3

    def test_injection_changes_no_bit(self, name, kind, dtype):
        case = self.table[name]
        x = case.input(dtype)
        expected = case.output(case.plain(dtype), x)
        output = case.output(case.adapted(kind, dtype), x)
        is_low_rank = disha.functional.method_of(method_of_kind(kind)).low_rank
        if case.has_own_product and not is_low_rank:
            close(output, expected, dtype)
        else:
            assert torch.equal(output, expected)

    def test_forward_is_that_of_the_dense_weight(self, name, kind, dtype):
        case = self.table[name]
        model = perturb(case.adapted(kind, dtype, scale=0.5))
        x = case.input(dtype)
        wide_x = x if case.looks_up else x.to(exact(dtype))
        expected = case.output(dense(case, model, dtype, 0.5), wide_x)
        close(case.output(model, x), expected.to(dtype), dtype)

    def test_merged_is_unmerged_and_comes_back_bit_for_bit(self, name, kind, dtype):
        case = self.table[name]
        model = perturb(case.adapted(kind, dtype))
        x = case.input(dtype)
        before = snapshot(model)
        expected = case.output(model, x)
        for _ in range(self.merges):
            disha.merge_adapters(model)
            merged = case.output(model, x)
            disha.unmerge_adapters(model)
        close(merged, expected, dtype)
        assert not torch.equal(merged, case.output(case.plain(dtype), x))
        assert_unchanged(model, before)
        assert torch.equal(case.output(model, x), expected)

    def test_file_round_trip_gives_equal_outputs(self, name, kind, dtype, tmp_path):
        case = self.table[name]
        model = perturb(case.adapted(kind, dtype))
        x = case.input(dtype)
        disha.save_adapter(model, tmp_path / "a")
        fresh = case.plain(dtype)
        disha.load_adapter(fresh, tmp_path / "a")
        assert torch.equal(case.output(fresh, x), case.output(model, x))

    def test_removal_restores(self, name, kind, dtype):
        case = self.table[name]
        model = case.plain(dtype)
        before = snapshot(model)
        case.adapt(model, r=1, method=method_of_kind(kind))
        disha.remove_adapters(model)
        assert_unchanged(model, before)


class PairTests:
    """What is tried in float64; a class of tests names its table, and parametrizes the others."""

    table: ClassVar[dict[str, Case]]

    def test_gradients_are_those_of_the_dense_weight(self, name, kind):
        case = self.table[name]
        model = perturb(case.adapted(kind))
        x = case.input().requires_grad_(not case.looks_up)
        inputs = [] if case.looks_up else [x]
        output = case.output(model, x)
        cotangent = torch.randn_like(output)
        blocks = {found.name: found.block.block for found in ModelView(model).blocks("default")}
        gradients = torch.autograd.grad((output * cotangent).sum(), [*blocks.values(), *inputs])

        leaves = {key: block.detach().clone().requires_grad_() for key, block in blocks.items()}
        plain = case.plain()
        parameters = {key: parameter.detach() for key, parameter in plain.named_parameters()}
        for key, delta in updates(model, blocks=leaves).items():
            parameters[key] = parameters[key] + delta
        dense_output = output_with(case, plain, parameters, x)
        expected = torch.autograd.grad(
            (dense_output * cotangent).sum(), [*leaves.values(), *inputs]
        )
        for gradient, expected_gradient in zip(gradients, expected, strict=True):
            close(gradient, expected_gradient)

    def test_copies_compute_the_same(self, name, kind):
        case = self.table[name]
        model = perturb(case.adapted(kind))
        x = case.input()
        for copied in (copy.deepcopy(model), pickled(model)):
            assert torch.equal(case.output(copied, x), case.output(model, x))

    def test_several_adapters_add_up_and_switch_off(self, name, kind):
        case = self.table[name]
        x = case.input()
        model = case.adapted(kind, adapter="a")
        perturb(case.adapt(model, r=1, adapter="b"))
        plain = add_updates(case.plain(), [updates(model, "a"), updates(model, "b")])
        disha.set_active_adapters(model, ["b", "a"])
        close(case.output(model, x), case.output(plain, x))
        with disha.adapters_disabled(model):
            close(case.output(model, x), case.output(case.plain(), x))

    def test_routing_equals_running_the_samples_one_by_one_or_is_refused(self, name, kind):
        case = self.table[name]
        x = case.input()
        model = case.adapted(kind, adapter="a")
        perturb(case.adapt(model, r=1, adapter="b"))
        names = list(itertools.islice(itertools.cycle(["b", "a", None]), len(x)))
        if case.routing_error is not None:
            with (
                pytest.raises((ArgumentError, ModeError), match=case.routing_error),
                disha.route_adapters(model, names),
            ):
                case.output(model, x)
            return
        with disha.route_adapters(model, names):
            routed = case.output(model, x)
        for adapter, sample, output in zip(names, x, routed, strict=True):
            disha.set_active_adapters(model, [] if adapter is None else adapter)
            close(output, case.output(model, sample[None])[0])
