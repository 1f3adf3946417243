"""Weighted sums of adapter files, against sums within a model."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

import disha
from disha import AdapterFileError, AdapterFileWarning, ArgumentError, ArgumentTypeError
from disha.config import AdapterConfig
from disha.files import AdapterHeader, LayerRecord, TensorRecord
from disha.files.combining import Summand, combine_contents
from disha.files.contents import read_contents, write_contents
from disha.fingerprint import fingerprint
from disha.model import ModelView
from tests.adapter_files import every_kind, save
from tests.conftest import perturb

KINDS = {
    "bone": {},
    "tile": {"r_out": 2},
    "bat": {"target_regex": "linear|attention", "method": "bat"},
}


def combine(*weighted, **reading):
    return combine_contents(
        [Summand(path, read_contents(path, **reading), weight) for path, weight in weighted]
    )


def updates(model, adapter):
    """Layer -> s * dW of an adapter, for the layers that it has."""
    return {
        name: weight.blocks[adapter].strength * weight.delta_weight(weight.blocks[adapter])
        for name, weight in ModelView(model).require(adapter)
    }


def load_all(paths):
    model = every_kind()
    for name, path in paths.items():
        disha.load_adapter(model, path, name)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_sum_within_a_model_bit_for_bit(tmp_path, kind):
    a = save(tmp_path / "a", seed=1, scale=0.5, **KINDS[kind])
    b = save(tmp_path / "b", seed=2, **{**KINDS[kind], "target_regex": "linear|attention"})
    model = load_all({"a": a, "b": b})
    disha.combine_adapters(model, {"a": 0.3, "b": -2.0}, into="c")
    disha.save_adapter(model, tmp_path / "expected", "c")
    expected, tensors = read_contents(tmp_path / "expected")
    header, found = combine((a, 0.3), (b, -2.0))
    assert header.layers == expected.layers
    assert header.tensors == expected.tensors
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("kind", ["bone", "tile"])
def test_different_r_get_the_least_common_multiple(tmp_path, kind):
    a = save(tmp_path / "a", seed=1, scale=3.0, **{**KINDS[kind], "r": 4})
    b = save(tmp_path / "b", seed=2, **{**KINDS[kind], "r": 6})
    header, tensors = combine((a, 0.3), (b, -2.0))
    assert {layer.r for layer in header.layers} == {12}
    write_contents(tmp_path / "sum", header, tensors)
    model = load_all({"a": a, "b": b, "sum": tmp_path / "sum"})
    parts, total = [updates(model, name) for name in ("a", "b")], updates(model, "sum")
    assert len(total) == 10
    for name, delta in total.items():
        torch.testing.assert_close(
            delta, 0.3 * parts[0][name] - 2 * parts[1][name], rtol=0, atol=1e-12
        )


def test_r_may_differ_from_layer_to_layer(tmp_path):
    a = save(tmp_path / "a", target_regex="linear|conv", rank_pattern={"conv": 3})
    b = save(tmp_path / "b", target_regex="linear|conv", r=6)
    header, _ = combine((a, 1.0), (b, 1.0))
    assert {layer.name: layer.r for layer in header.layers} == {"linear": 12, "conv": 6}


def test_what_only_one_has_is_scaled(tmp_path):
    a, b = save(tmp_path / "a", target_regex="linear"), save(tmp_path / "b", target_regex="^up")
    header, tensors = combine((a, 2.0), (b, 0.0))
    assert [layer.name for layer in header.layers] == ["linear", "up"]
    assert torch.equal(tensors["linear.bone_block"], 2 * read_contents(a)[1]["linear.bone_block"])
    assert not tensors["up.bone_block"].any()


def test_the_wider_dtype_holds_the_sum_of_exact_terms(tmp_path):
    values = torch.tensor([[1 / 3], [1e-3]])

    def contents(name, dtype):
        model = nn.Sequential(nn.Linear(2, 1))
        disha.inject_adapters(model, "0", r=2, dtype=dtype)
        with torch.no_grad():
            model[0].disha["default"].block.copy_(values)
        disha.save_adapter(model, tmp_path / name)
        return tmp_path / name

    warnings.simplefilter("ignore", AdapterFileWarning)  # the layers differ
    half, full = contents("half", torch.bfloat16), contents("full", torch.float32)
    for order in ((half, full), (full, half)):
        found = combine(*((path, 0.3) for path in order))[1]["0.bone_block"]
        exact = 0.3 * (values.bfloat16().double() + values.double())
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, exact.float(), rtol=1e-7, atol=0)
    narrow = combine((half, 0.3), (half, 0.7))[1]["0.bone_block"]
    assert torch.equal(narrow, values.bfloat16())  # rounded once


def test_configuration_keeps_what_is_common(tmp_path):
    a = save(tmp_path / "a", target_regex="linear", dropout=0.1, rank_pattern={"linear": 3})
    b = save(tmp_path / "b", target_regex="^up|conv", exclude="conv")
    assert combine((a, 1.0))[0].config.target == "linear"
    config = combine((a, 1.0), (b, 1.0))[0].config
    assert (config.target, config.exclude, dict(config.rank_pattern)) == (None, (), {})
    assert (config.scale, config.dropout, config.also_train) == (1.0, 0.1, ())


def test_configuration_keeps_what_both_leave_out_and_no_dtype(tmp_path):
    options = {"target_regex": "linear|^up", "exclude": "up", "dtype": torch.float32}
    a, b = save(tmp_path / "a", **options), save(tmp_path / "b", seed=2, **options)
    config = combine((a, 1.0), (b, 1.0))[0].config
    assert (config.target, config.exclude, config.dtype) == ("linear|^up", ("up",), None)


def test_three_parameters_beside_the_blocks_are_named(tmp_path):
    a = save(tmp_path / "a", target_regex="linear", also_train=["^conv", "^embed"])
    with pytest.raises(ArgumentError, match=r"\(conv.bias, conv.weight, embed.weight\), which"):
        combine((a, 1.0))
    b = save(tmp_path / "b", target_regex="linear", also_train=["^conv", "^embed", "^padded"])
    with pytest.raises(ArgumentError, match=r"\(conv.bias, conv.weight, embed.weight, \.\.\.\)"):
        combine((b, 1.0))


def test_parameters_beside_the_blocks_are_refused_or_left_out(tmp_path):
    a = save(tmp_path / "a", target_regex="linear", also_train="^conv.bias")
    with pytest.raises(ArgumentError, match=r"conv\.bias.*leave out `also_train`"):
        combine((a, 1.0))
    header, tensors = combine((a, 1.0), also_train=False)
    assert (header.also_train, list(tensors)) == ((), ["linear.bone_block"])


def test_other_bases_warn_and_leave_no_fingerprint(tmp_path):
    a = save(tmp_path / "a", target_regex="linear|^up")
    b = save(tmp_path / "b", target_regex="linear", base=5)
    with pytest.warns(AdapterFileWarning, match=r"different base weights in 1 layers \(linear\)"):
        header, _ = combine((a, 1.0), (b, 1.0))
    assert [layer.base is None for layer in header.layers] == [True, False]


def test_names_in_warnings_are_fit_to_be_printed():
    def summand(base):
        record = LayerRecord("a\x1b[2J", "bone", 2, None, 4, 4, 1.0, base, "linear")
        block = torch.ones(2, 4)
        header = AdapterHeader(
            config=AdapterConfig(r=2, target=None),
            layers=(record,),
            also_train=(),
            tensors={record.key: TensorRecord((2, 4), block.dtype)},
            metadata={},
        )
        return Summand("given", (header, {record.key: block}), 1.0)

    weights = (torch.zeros(4, 4), torch.ones(4, 4))
    with pytest.warns(AdapterFileWarning) as caught:
        combine_contents([summand(fingerprint(weight)) for weight in weights])
    assert r"(a\x1b[2J)" in str(caught[0].message)


def test_one_unknown_base_is_no_contradiction(tmp_path):
    a = save(tmp_path / "a", target_regex="linear")
    header, tensors = read_contents(a)
    unknown = replace(header, layers=tuple(replace(one, base=None) for one in header.layers))
    total, _ = combine_contents(
        [Summand("unknown", (unknown, tensors), 1.0), Summand(a, (header, tensors), 1.0)]
    )
    assert total.layers[0].base == header.layers[0].base is not None


def other_model(path, **injected):
    """Save an adapter of layers of the same names and other sizes, or other kinds."""
    model = nn.Module()
    model.linear, model.conv = nn.Linear(14, 8), nn.Conv2d(14, 6, (3, 3))
    model.embed = nn.Linear(14, 6)
    disha.inject_adapters(model, **{"target_regex": ".", "r": 4, **injected})
    disha.save_adapter(model, path)
    return path


REFUSED = {
    "another kind": ({}, {"target_regex": "linear", "method": "bat"}, "different kinds.*bat in"),
    "another tile": (
        {"r_out": 2},
        {"target_regex": "linear", "r_out": 3},
        "different kinds.*r_out=3 in",
    ),
    "another r of BAT": (KINDS["bat"], {**KINDS["bat"], "r": 2}, "bat blocks.*r=4.*r=2"),
    "too large a multiple": (
        {"target_regex": "linear"},
        {"target_regex": "linear", "r": 5},
        "'linear'.*r=20.*only 14 inputs.*as LoRA",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    first, second, says = REFUSED[case]
    a, b = save(tmp_path / "a", **first), save(tmp_path / "b", **second)
    with pytest.raises(AdapterFileError, match=says):
        combine((a, 1.0), (b, 1.0))


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("linear", "'linear' has different sizes: .*14 -> 6 in .*14 -> 8 in"),
        ("conv", r"'conv': blocks of shapes .*\(6, 4, 2, 3\), \(6, 4, 3, 3\)"),
        ("embed", "'embed' is laid out in different ways .*'index out' in .*'out in' in"),
    ],
)
def test_another_models_layers_are_refused(tmp_path, target, says):
    a, b = (
        save(tmp_path / "a", target_regex=target),
        other_model(tmp_path / "b", target_regex=target),
    )
    with pytest.raises(AdapterFileError, match=says):
        combine((a, 1.0), (b, 1.0))


@pytest.mark.parametrize(
    ("weight", "kind", "says"),
    [
        (float("nan"), ArgumentError, "finite"),
        ("1", ArgumentTypeError, "number"),
        (3e38, AdapterFileError, "'linear': the sum is not finite as torch.float32"),
    ],
)
def test_weights_must_be_numbers_and_lead_to_numbers(tmp_path, weight, kind, says):
    model = disha.inject_adapters(every_kind(dtype=torch.float32), "linear", r=4)
    perturb(model, size=10.0)
    disha.save_adapter(model, tmp_path / "a")
    with pytest.raises(kind, match=says):
        combine((tmp_path / "a", weight))


def test_none_is_refused():
    with pytest.raises(ArgumentError, match="at least one"):
        combine_contents([])
