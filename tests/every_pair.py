"""The tests of one table: modules, each with every method, against dense weights of slow loops.

`tests/layers/test_layouts.py` has a row for each layout, and `tests/layers/test_kinds.py` one for
each kind of layer.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import disha
from disha import ArgumentError, ModeError, functional
from disha.layers.weights import base_of
from disha.model.view import ModelView
from tests import reference
from tests.conftest import assert_unchanged, perturb, pickled, snapshot
from tests.reference import settings_of

METHODS_WITHOUT_TILE = tuple(functional.METHODS)


@dataclass(frozen=True)
class Row:
    """A module with weights of some layout, and an input for it.

    `routes` is False where samples can't be routed, and `refusal` what the error says then.
    `splits` says that dW takes products of its own, which round differently from one product.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    indices: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    methods: tuple[str, ...] = (METHODS_WITHOUT_TILE[0], "tile", *METHODS_WITHOUT_TILE[1:])
    routes: bool = True
    refusal: str = "can't"
    call: Callable[[nn.Module, torch.Tensor], Any] = lambda module, x: module(x)
    compiles: bool = True
    exports: bool = True
    splits: bool = False

    def plain(self, dtype=torch.float64):
        torch.manual_seed(0)
        return nn.Sequential(self.make()).to(dtype)

    def adapted(self, method, dtype=torch.float64, **options):
        own = {"target_regex": "^0", **settings_of(method, 2), **self.options, **options}
        return disha.inject_adapters(self.plain(dtype), r=2, **own)

    def input(self, dtype=torch.float64):
        generator = torch.Generator().manual_seed(1)
        if self.indices:
            return torch.randint(self.indices, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator, dtype=torch.float64).to(dtype)

    def output(self, model, x):
        found = self.call(model[0], x)
        return found[0] if isinstance(found, tuple) else found


LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.06, torch.float16: 0.02}


def close(actual, expected, dtype=torch.float64):
    assert actual.dtype == expected.dtype
    limit = LIMITS[dtype] * max(1.0, float(expected.detach().double().abs().max()))
    assert (actual.double() - expected.double()).abs().max() <= limit


def updates(adapted, adapter="default", blocks=None):
    """Return parameter name -> dW by the oracle, as far as blocks go in float64."""
    found = {}
    for name, layer, _, block in ModelView(adapted).blocks(adapter):
        values = block.block.detach().double() if blocks is None else blocks[name]
        module = next(n for n, m in adapted.named_modules() if m is layer)
        key = f"{module}.{block.slot.parameter}"
        layout = block.slot.layout
        delta = reference.layout_delta_weight(
            block.method.name, layout.pattern, values, base_of(layer, block.slot).detach().double(),
            block.slot.rows, layout.groups, layout.padding_idx,
        )  # fmt: skip
        found[key] = found[key] + delta if key in found else delta
    return found


def dense(row, adapted, scale=1.0, adapter="default"):
    """Return the plain model in float64 with the updates in its weights."""
    block = ModelView(adapted).blocks(adapter)[0].block.block
    plain = row.plain(block.dtype).double()
    with torch.no_grad():
        for key, delta in updates(adapted, adapter).items():
            plain.get_parameter(key).add_(delta * scale)
    return plain


class DtypeTests:
    """What holds in every dtype; a class of tests names its table, and parametrizes all three."""

    table: ClassVar[dict[str, Row]]
    merges: ClassVar[int] = 3

    def test_injection_changes_no_bit(self, name, method, dtype):
        row = self.table[name]
        x = row.input(dtype)
        expected = row.output(row.plain(dtype), x)
        output = row.output(row.adapted(method, dtype), x)
        uses_shard_sum = method == "tile" or functional.METHODS[method].uses_shard_sum
        if row.splits and not uses_shard_sum:
            close(output, expected, dtype)
        else:
            assert torch.equal(output, expected)

    def test_forward_is_that_of_the_dense_weight(self, name, method, dtype):
        row = self.table[name]
        model, x = perturb(row.adapted(method, dtype, scale=0.5)), row.input(dtype)
        expected = row.output(dense(row, model, 0.5), x if row.indices else x.double())
        close(row.output(model, x), expected.to(dtype), dtype)

    def test_merged_is_unmerged_and_comes_back_bit_for_bit(self, name, method, dtype):
        row = self.table[name]
        model, x = perturb(row.adapted(method, dtype)), row.input(dtype)
        before, expected = snapshot(model), row.output(model, x)
        for _ in range(self.merges):
            disha.merge_adapters(model)
            merged = row.output(model, x)
            disha.unmerge_adapters(model)
        close(merged, expected, dtype)
        assert not torch.equal(merged, row.output(row.plain(dtype), x))
        assert_unchanged(model, before)
        assert torch.equal(row.output(model, x), expected)

    def test_file_round_trip_gives_equal_outputs(self, name, method, dtype, tmp_path):
        row = self.table[name]
        model, x = perturb(row.adapted(method, dtype)), row.input(dtype)
        disha.save_adapter(model, tmp_path / "a")
        fresh = row.plain(dtype)
        disha.load_adapter(fresh, tmp_path / "a")
        assert torch.equal(row.output(fresh, x), row.output(model, x))

    def test_removal_restores(self, name, method, dtype):
        row = self.table[name]
        model = row.plain(dtype)
        before = snapshot(model)
        disha.inject_adapters(
            model,
            **{"target_regex": "^0", **row.options},
            r=1,
            method=method.replace("tile", "bone"),
        )
        disha.remove_adapters(model)
        assert_unchanged(model, before)


class PairTests:
    """What is tried in float64; a class of tests names its table, and parametrizes the others."""

    table: ClassVar[dict[str, Row]]

    def test_gradients_are_those_of_the_dense_weight(self, name, method):
        row = self.table[name]
        model, plain, x = perturb(row.adapted(method)), row.plain(), row.input()
        x.requires_grad_(not row.indices)
        own = {one.name: one.block.block for one in ModelView(model).blocks("default")}
        leaves = {key: block.detach().clone().requires_grad_() for key, block in own.items()}
        y = torch.randn_like(row.output(model, x))
        inputs = [x] if x.requires_grad else []
        found = torch.autograd.grad((row.output(model, x) * y).sum(), [*own.values(), *inputs])
        state = {key: parameter.detach() for key, parameter in plain.named_parameters()}
        for key, delta in updates(model, blocks=leaves).items():
            state[key] = state[key] + delta

        class Whole(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = plain

            def forward(self, x):
                return row.output(self.model, x)

        named = {f"model.{key}": value for key, value in state.items()}
        if isinstance(plain[0], nn.RNNBase):  # torch's keeps a list of its weights
            for key, value in state.items():
                own_name = key.removeprefix("0.")
                plain[0]._parameters.pop(own_name)
                index = plain[0]._flat_weights_names.index(own_name)
                plain[0]._flat_weights[index] = value
            output = row.output(plain, x)
        else:
            output = torch.func.functional_call(Whole(), named, (x,))
        expected = torch.autograd.grad((output * y).sum(), [*leaves.values(), *inputs])
        for one, other in zip(found, expected, strict=True):
            close(one, other)

    def test_copies_compute_the_same(self, name, method):
        row = self.table[name]
        model, x = perturb(row.adapted(method)), row.input()
        for copied in (copy.deepcopy(model), pickled(model)):
            assert torch.equal(row.output(copied, x), row.output(model, x))

    def test_several_adapters_add_up_and_switch_off(self, name, method):
        row = self.table[name]
        x, model = row.input(), row.adapted(method, adapter="a")
        own = {"target_regex": "^0", **row.options}
        perturb(disha.inject_adapters(model, r=1, adapter="b", **own))
        plain = row.plain()
        with torch.no_grad():
            for adapter in "ab":
                for key, delta in updates(model, adapter).items():
                    plain.get_parameter(key).add_(delta)
        disha.set_active_adapters(model, ["b", "a"])
        close(row.output(model, x), row.output(plain, x))
        with disha.adapters_disabled(model):
            close(row.output(model, x), row.output(row.plain(), x))

    def test_routing_equals_running_the_samples_one_by_one_or_is_refused(self, name, method):
        row = self.table[name]
        model, x = row.adapted(method, adapter="a"), row.input()
        own = {"target_regex": "^0", **row.options}
        perturb(disha.inject_adapters(model, r=1, adapter="b", **own))
        names = (["b", "a", None] * len(x))[: len(x)]
        if not row.routes:
            with (
                pytest.raises((ArgumentError, ModeError), match=row.refusal),
                disha.route_adapters(model, names),
            ):
                row.output(model, x)
            return
        with disha.route_adapters(model, names):
            routed = row.output(model, x)
        for adapter, sample, output in zip(names, x, routed, strict=True):
            disha.set_active_adapters(model, [] if adapter is None else adapter)
            close(output, row.output(model, sample[None])[0])
