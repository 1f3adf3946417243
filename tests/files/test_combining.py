"""Weighted sums of adapters: of files and within a model, by the same rules."""

import warnings

import pytest
import torch
from torch import nn

import disha
from disha import (
    AdapterFileWarning,
    AdapterStateError,
    ArgumentError,
    ArgumentTypeError,
    MergeError,
    ModeError,
    TargetError,
)
from disha.files.combining import Summand, combine_contents
from disha.files.contents import keep_blocks, read_contents, write_contents
from disha.model.view import ModelView
from tests.adapter_files import every_kind, save
from tests.conftest import assert_same, flags, refused
from tests.functional.test_methods import Gained
from tests.model.test_inject import WrappedByParallel
from tests.reference import KINDS, settings_of


def options_of(kind):
    """Return the settings of an adapter of a kind, on weights that can have it."""
    options = settings_of(kind, 2)
    if kind == "bat":
        options["target_regex"] = "linear|attention"
    return options


def combine(*weighted, r=None, read=read_contents):
    return combine_contents([Summand(path, read(path), weight) for path, weight in weighted], r)


def updates(model, adapter):
    """Layer -> s * dW of an adapter, for the layers that it has."""
    return {
        name: block.scale * layer.delta_weight(block)
        for name, layer, _, block in ModelView(model).require(adapter)
    }


def load_all(paths, **options):
    model = every_kind()
    for name, path in paths.items():
        disha.load_adapter(model, path, name, **options)
    return model


class TestSum:
    @pytest.mark.parametrize("kind", KINDS)
    def test_files_and_models_give_the_same_bit_for_bit(self, tmp_path, kind):
        a = save(tmp_path / "a", seed=1, scale=0.5, **options_of(kind))
        b = save(tmp_path / "b", seed=2, **{**options_of(kind), "target_regex": "linear|attention"})
        model = load_all({"a": a, "b": b})
        disha.combine_adapters(model, {"a": 0.3, "b": -2.0}, into="c")
        disha.save_adapter(model, tmp_path / "expected", "c")
        expected = read_contents(tmp_path / "expected")
        found = combine((a, 0.3), (b, -2.0))
        found_layers, layers = (sorted(one.layers, key=repr) for one in (found, expected))
        assert found_layers == layers
        assert found.config == expected.config
        assert found.tensors.keys() == expected.tensors.keys()
        assert_same(found.tensors, expected.tensors)

    @pytest.mark.parametrize(
        ("kind", "sizes"), [("bone", (4, 6)), ("tile", (4, 6)), ("bat", (4, 4))]
    )
    def test_is_the_weighted_sum_of_the_updates(self, tmp_path, kind, sizes):
        """Different r get the least common multiple; a layer that one lacks counts as zero."""
        a = save(tmp_path / "a", seed=1, scale=3.0, **{**options_of(kind), "r": sizes[0]})
        options = {**options_of(kind), "r": sizes[1], "target_regex": "linear|attention"}
        b = save(tmp_path / "b", seed=2, **options)
        model = load_all({"a": a, "b": b})
        disha.combine_adapters(model, {"a": 0.3, "b": -2.0}, into="c")
        parts, total = [updates(model, name) for name in ("a", "b")], updates(model, "c")
        assert total.keys() == parts[0].keys()
        assert set(parts[1]) < set(parts[0]) or kind == "bat"
        for name, delta in total.items():
            expected = 0.3 * parts[0][name] - 2 * parts[1].get(name, 0 * delta)
            torch.testing.assert_close(delta, expected, rtol=0, atol=1e-12)
        found = {one.block.r for one in ModelView(model).require("c")}
        assert found == ({4} if kind == "bat" else {12, 4})

    def test_a_larger_r_may_be_asked_for(self, tmp_path):
        a = save(tmp_path / "a", target_regex="linear|^up", r=7)
        model = load_all({"a": a})
        disha.combine_adapters(model, {"a": 1.0}, into="wide", r=14)
        combined = combine((a, 1.0), r=14)
        assert {layer.r for layer in combined.layers} == {14}
        for name, _, _, block in ModelView(model).require("wide"):
            assert torch.equal(block.block, combined.tensors[f"{name}.bone_block"])
        assert_same(updates(model, "wide"), updates(model, "a"))

    def test_r_may_differ_from_layer_to_layer(self, tmp_path):
        a = save(tmp_path / "a", target_regex="linear|conv", rank_pattern={"conv": 3})
        b = save(tmp_path / "b", target_regex="linear|conv", r=6)
        combined = combine((a, 1.0), (b, 1.0))
        assert {layer.name: layer.r for layer in combined.layers} == {"linear": 12, "conv": 6}

    def test_what_only_one_has_is_scaled(self, tmp_path):
        a = save(tmp_path / "a", target_regex="linear")
        b = save(tmp_path / "b", target_regex="^up")
        combined = combine((a, 2.0), (b, 0.0))
        assert [layer.name for layer in combined.layers] == ["linear", "up"]
        block = read_contents(a).tensors["linear.bone_block"]
        assert torch.equal(combined.tensors["linear.bone_block"], 2 * block)
        assert not combined.tensors["up.bone_block"].any()

    def test_the_wider_dtype_holds_the_sum_of_exact_terms(self, tmp_path):
        values = torch.tensor([[1 / 3], [1e-3]])

        def contents(name, dtype):
            model = disha.inject_adapters(nn.Sequential(nn.Linear(2, 1)), "0", r=2, dtype=dtype)
            model[0].disha["default"].block.data.copy_(values)
            disha.save_adapter(model, tmp_path / name)
            return tmp_path / name

        warnings.simplefilter("ignore", AdapterFileWarning)  # the layers differ
        half, full = contents("half", torch.bfloat16), contents("full", torch.float32)
        for order in ((half, full), (full, half)):
            contents = combine(*((path, 0.3) for path in order))
            found = contents.tensors["0.bone_block"]
            assert contents.layers[0].base is None
            exact = 0.3 * (values.bfloat16().double() + values.double())
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, exact.float(), rtol=1e-7, atol=0)
        narrow = combine((half, 0.3), (half, 0.7)).tensors["0.bone_block"]
        assert torch.equal(narrow, values.bfloat16())  # rounded once

    def test_it_can_be_saved_and_loaded(self, tmp_path):
        a = save(tmp_path / "a", target_regex="linear|^up")
        write_contents(tmp_path / "double", combine((a, 2.0)))
        model = load_all({"a": a, "twice": tmp_path / "double"})
        disha.set_adapter_scale(model, 2.0, "a")
        assert_same(updates(model, "twice"), updates(model, "a"))


class TestConfiguration:
    def test_is_the_first_one_s_without_what_selects_layers(self, tmp_path):
        options = {"dropout": 0.1, "rank_pattern": {"linear": 3}, "dtype": torch.float64}
        a = save(tmp_path / "a", target_regex="linear", **options)
        b = save(tmp_path / "b", target_regex="^up|conv", exclude="conv")
        config = combine((a, 1.0), (b, 1.0)).config
        assert (config.target, config.exclude, dict(config.rank_pattern)) == (None, (), {})
        assert (config.r, config.scale, config.dropout, config.also_train) == (3, 1.0, 0.1, ())
        assert config.dtype is None


class TestModel:
    def test_only_the_new_adapter_is_new(self, tmp_path):
        a, b = save(tmp_path / "a"), save(tmp_path / "b", target_regex="linear", r=2)
        model = load_all({"a": a, "b": b}, freeze=False)
        model.conv.disha["a"].block.requires_grad_(False)
        before = flags(model)
        disha.combine_adapters(model, {"a": 0.3, "b": -2.0}, into="c")
        after = flags(model)
        assert {name: flag for name, flag in after.items() if ".c." not in name} == before
        assert model.linear.disha.active == ("b",)
        assert model.linear.disha["c"].block.requires_grad
        assert not model.conv.disha["c"].block.requires_grad
        assert model.linear.disha["c"].block.dtype == torch.float64

    def test_parameters_beside_the_blocks_stay_as_they_are(self, tmp_path):
        a = save(tmp_path / "a", target_regex="linear", also_train="^conv.bias")
        model = load_all({"a": a})
        bias = model.conv.bias.detach().clone()
        disha.combine_adapters(model, {"a": 3.0}, into="c", also_train=False)
        assert torch.equal(model.conv.bias, bias)
        assert list(disha.adapter_state_dict(model, "c")) == ["linear.disha.c.bone_block"]

    def test_statistics_stay_in_the_model_and_are_saved_with_the_sum(self, tmp_path):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        model = disha.inject_adapters(model, "0", r=2, adapter="a")
        model.train()(torch.randn(8, 4))
        mean = model[1].running_mean.clone()
        disha.combine_adapters(model, {"a": 2.0}, into="c")
        disha.save_adapter(model, tmp_path / "c", "c")
        assert torch.equal(read_contents(tmp_path / "c").tensors["1.running_mean"], mean)

    @pytest.mark.parametrize(
        ("weights", "options", "kind", "says"),
        [
            ({"x": 1.0}, {}, ArgumentError, "no adapter 'x'"),
            ({}, {}, ArgumentTypeError, "dict"),
            (["a"], {}, ArgumentTypeError, "dict"),
            ({"a": 1.0}, {"into": "b"}, ArgumentError, "has an adapter 'b' already"),
            ({"a": 1.0}, {"into": "d.e"}, ArgumentError, "contain a dot"),
            (
                {"a": 1.0},
                {"r": 3},
                ArgumentError,
                "can't be added with r=3: .* in adapter 'a'; give",
            ),
            ({"a": 1.0}, {"r": 16}, ArgumentError, "needs r=16, but the layer has only 14 inputs"),
            ({"a": 1.0}, {"r": 0}, ArgumentError, "r must be at least 1"),
            ({"a": 1.0}, {"r": "8"}, ArgumentTypeError, "r must be an int"),
        ],
    )
    def test_refusals(self, tmp_path, weights, options, kind, says):
        a = save(tmp_path / "a", target_regex="linear")
        model = load_all({"a": a, "b": a})
        with refused(model, kind, says):
            disha.combine_adapters(model, weights, **{"into": "d", **options})

    def test_values_that_are_not_finite(self, tmp_path):
        model = load_all({"a": save(tmp_path / "a", target_regex="linear")})
        model.linear.disha["a"].block.data[0, 0] = float("inf")
        with refused(model, AdapterStateError, "not finite"):
            disha.combine_adapters(model, {"a": 1.0}, into="c")

    def test_in_a_mode_of_the_model(self, tmp_path):
        model = load_all({"a": save(tmp_path / "a", target_regex="linear")})
        with (
            disha.adapters_disabled(model),
            pytest.raises(ModeError, match="can't combine adapters"),
        ):
            disha.combine_adapters(model, {"a": 1.0}, into="c")
        wrapped = WrappedByParallel(model)
        says = "can't combine adapters: the model is wrapped by .*; combine first, then wrap$"
        with refused(wrapped, TargetError, says):
            disha.combine_adapters(wrapped, {"a": 1.0}, into="c")
        disha.merge_adapters(model)
        with refused(model, MergeError, "can't combine adapters"):
            disha.combine_adapters(model, {"a": 1.0}, into="c")


LINEAR, BOTH, NAN = {"target_regex": "linear"}, (1.0, 1.0), float("nan")
REFUSED = {
    "another method": ({}, {**LINEAR, "method": "bat"}, BOTH, "different methods or r_out"),
    "another method on another layer": (
        {"target_regex": "^up"}, {**LINEAR, "method": "bat"}, BOTH, "different methods"),
    "another tile": ({"r_out": 2}, {**LINEAR, "r_out": 3}, BOTH, "different methods or r_out"),
    "another r of BAT": (
        options_of("bat"), {**options_of("bat"), "r": 2}, BOTH,
        "bat blocks can't be added with r=4: r=4, .* in .*; r=2, .* in .*; give an r that",
    ),
    "too large a multiple": (
        LINEAR, {**LINEAR, "r": 5}, BOTH, "'linear'.*r=20.*only 14 inputs.*as LoRA"),
    "parameters beside": (
        {**LINEAR, "also_train": ["^conv", "^embed"]}, LINEAR, BOTH,
        r"\(conv.bias, conv.weight, embed.weight\).*leave out `also_train`"),
    "many parameters beside": (
        {**LINEAR, "also_train": ["^conv", "^embed", "^padded"]}, LINEAR, BOTH,
        r"\(conv.bias, conv.weight, embed.weight, and 1 more\)"),
    "a weight that is none": (LINEAR, LINEAR, (NAN, 1.0), "the weight of an adapter.*finite"),
    "a weight that is no number": (LINEAR, LINEAR, ("1", 1.0), "number"),
    "a sum that is not finite": (
        {**LINEAR, "dtype": torch.float16}, {**LINEAR, "dtype": torch.float16}, (3e38, 1.0),
        "'linear': the sum is not finite as torch.float16"),
}  # fmt: skip


class TestRefusals:
    @pytest.mark.parametrize("case", REFUSED)
    def test_of_files_and_of_models_alike(self, tmp_path, case):
        first, second, weights, says = REFUSED[case]
        a, b = save(tmp_path / "a", **first), save(tmp_path / "b", seed=2, **second)
        model = load_all({"a": a, "b": b})
        kind = ArgumentTypeError if "1" in weights else ArgumentError
        with pytest.raises(kind, match=says):
            combine((a, weights[0]), (b, weights[1]))
        with refused(model, kind, says):
            disha.combine_adapters(model, dict(zip("ab", weights, strict=True)), into="c")

    def test_a_method_whose_update_is_not_linear_in_the_block(self, tmp_path, monkeypatch):
        disha.register_method(Gained())
        options = {"target_regex": "linear", "method": "gained"}
        a, b = save(tmp_path / "a", **options), save(tmp_path / "b", seed=2, **options)
        model = load_all({"a": a, "b": b})
        says = "'linear': gained blocks can't be added, because dW is not linear"
        with pytest.raises(ArgumentError, match=says):
            combine((a, 1.0), (b, 1.0))
        with pytest.raises(ArgumentError, match=says):
            disha.combine_adapters(model, {"a": 1.0, "b": 1.0}, into="c")

    @pytest.mark.parametrize(
        ("target", "says"),
        [
            ("linear", "'linear' is not the same in all adapters: .*14 -> 6.* in .*14 -> 8.* in"),
            ("conv", r"'conv' is not the same .*\(6, 4, 2, 3\) in .*\(6, 4, 3, 3\) in"),
            ("embed", "'embed' is not the same .*'index out'.* in .*'out in'.* in"),
        ],
    )
    def test_another_models_layers(self, tmp_path, target, says):
        other = nn.Module()
        other.linear, other.conv = nn.Linear(14, 8), nn.Conv2d(14, 6, (3, 3))
        other.embed = nn.Linear(14, 6)
        disha.save_adapter(disha.inject_adapters(other, target, 4), tmp_path / "b")
        with pytest.raises(ArgumentError, match=says):
            combine((save(tmp_path / "a", target_regex=target), 1.0), (tmp_path / "b", 1.0))

    def test_the_layer_that_is_the_model(self, tmp_path):
        for name, inputs in (("a", 4), ("b", 8)):
            disha.save_adapter(disha.inject_adapters(nn.Linear(inputs, 6), "", 2), tmp_path / name)
        with pytest.raises(ArgumentError, match=r"^layer '\(the model\)' is not the same"):
            combine((tmp_path / "a", 1.0), (tmp_path / "b", 1.0))

    def test_parameters_beside_the_blocks_can_be_left_out(self, tmp_path):
        a = save(tmp_path / "a", target_regex="linear", also_train="^conv.bias")
        combined = combine((a, 1.0), read=lambda path: keep_blocks(read_contents(path)))
        assert (combined.also_train, list(combined.tensors)) == ((), ["linear.bone_block"])
