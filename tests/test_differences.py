"""What differs between adapter files."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import disha
from disha.files import statistics
from disha.files.contents import read_contents, write_contents
from disha.files.differences import header_differences, tensor_differences
from tests.adapter_files import save


def differences(a, b):
    first, second = disha.inspect_adapter(a), disha.inspect_adapter(b)
    return {one.name: one for one in tensor_differences(first, second)}


def header(a, b):
    first, second = disha.inspect_adapter(a), disha.inspect_adapter(b)
    return {one.field: (one.first, one.second) for one in header_differences(first, second)}


def changed(path, source, **tensors):
    """Write a copy of a file with other values."""
    contents, values = read_contents(source)
    write_contents(path, contents, {**values, **tensors})
    return path


def test_a_file_and_its_copy_are_the_same(tmp_path):
    a = save(tmp_path / "a", also_train="^embed")
    b = changed(tmp_path / "b", a)
    found = differences(a, b)
    assert len(found) == 11
    assert all(one.same and one.largest == one.relative == 0 for one in found.values())
    assert [one.name for one in found.values() if not one.layer] == ["embed.weight"]
    assert header(a, b) == {}


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_how_far_values_are_apart(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(statistics, "CHUNK", chunk)
    a = save(tmp_path / "a", target_regex="linear|^up")
    block = read_contents(a)[1]["linear.bone_block"]
    other = block.clone()
    other[1, 2] += 0.5
    other[3, 0] -= 2.0
    found = differences(a, changed(tmp_path / "b", a, **{"linear.bone_block": other}))
    assert found["up"].same
    one = found["linear"]
    assert (one.same, one.held, one.fields) == (False, "both", ())
    assert one.largest == pytest.approx(2.0)
    larger = max(float(block.norm()), float(other.norm()))
    assert one.relative == pytest.approx(float((other - block).norm()) / larger)


def test_it_is_the_same_the_other_way_round(tmp_path):
    a, b = save(tmp_path / "a"), save(tmp_path / "b", seed=2)
    there, back = differences(a, b), differences(b, a)
    assert all(there[name].largest == back[name].largest > 0 for name in there)
    assert all(there[name].relative == back[name].relative > 0 for name in there)


def test_what_only_one_has_comes_with_its_holder(tmp_path):
    a = save(tmp_path / "a", target_regex="linear|conv", also_train="^embed")
    b = save(tmp_path / "b", target_regex="linear|^up")
    found = differences(a, b)
    assert {name: one.held for name, one in found.items()} == {
        "linear": "both",
        "conv": "first",
        "embed.weight": "first",
        "up": "second",
    }
    assert found["conv"].largest is None
    assert not found["up"].same


def test_sizes_scale_base_and_dtype_are_named(tmp_path):
    a = save(tmp_path / "a", target_regex="linear")
    b = save(tmp_path / "b", target_regex="linear", scale=0.5, base=3, dtype=torch.bfloat16)
    c = save(tmp_path / "c", target_regex="linear", r=6)
    fields = {one.field: (one.first, one.second) for one in differences(a, b)["linear"].fields}
    assert fields.keys() == {"scale", "base", "dtype"}
    assert fields["scale"] == (1.0, 0.5)
    assert fields["dtype"] == ("float64", "bfloat16")
    assert 0 < differences(a, b)["linear"].relative < 0.01
    one = differences(a, c)["linear"]
    assert {field.field for field in one.fields} == {"r", "shape"}
    assert one.largest is None


def test_configuration_and_notes(tmp_path):
    a = save(tmp_path / "a", target_regex="linear", dropout=0.1)
    b = save(tmp_path / "b", target_regex="linear$")
    contents, values = read_contents(b)
    write_contents(b, replace(contents, metadata={"task": "x"}), values)
    assert header(a, b) == {
        "target": ("linear", "linear$"),
        "dropout": (0.1, 0.0),
        "metadata.task": (None, "x"),
    }


def test_values_that_are_not_finite_differ_from_all(tmp_path):
    a = save(tmp_path / "a", target_regex="linear")
    block = read_contents(a)[1]["linear.bone_block"]
    block[0, 0] = float("nan")
    b = changed(tmp_path / "b", a, **{"linear.bone_block": block})
    for one in (differences(a, b)["linear"], differences(b, b)["linear"]):
        assert (one.same, one.largest, one.relative) == (False, None, None)


def test_zeros_do_not_differ_from_zeros(tmp_path):
    a = save(tmp_path / "a", target_regex="linear")
    zeros = torch.zeros_like(read_contents(a)[1]["linear.bone_block"])
    b = changed(tmp_path / "b", a, **{"linear.bone_block": zeros})
    one = differences(b, changed(tmp_path / "c", b))["linear"]
    assert (one.same, one.largest, one.relative) == (True, 0.0, 0.0)
