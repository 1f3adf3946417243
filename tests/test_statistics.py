"""Statistics of adapter files, against norms of whole updates and of whole tensors."""

from __future__ import annotations

import math

import pytest
import torch

import disha
from disha.files import statistics
from disha.files.statistics import delta_norm, statistics_of, tensor_statistics
from disha.functional import Layout
from disha.model import ModelView
from disha.records import LayerRecord
from tests.adapter_files import every_kind, save


def found_in(path):
    return dict(statistics_of(disha.inspect_adapter(path)))


@pytest.mark.parametrize("injected", [{}, {"r_out": 2}, {"r": 14}], ids=["bone", "tile", "r=in"])
def test_the_norm_of_the_update_is_that_of_the_whole_matrix(tmp_path, injected):
    path = save(tmp_path / "a", scale=-0.7, **injected)
    model = every_kind()
    disha.load_adapter(model, path)
    found, compared = found_in(path), 0
    for name, layer, _, block in ModelView(model).require("default"):
        norm = found[f"{name}.bone_block"].delta_norm
        delta = layer.delta_weight(block)
        assert norm == pytest.approx(0.7 * float(delta.detach().norm()), rel=1e-12)
        compared += 1
    assert compared == 10


def test_the_norm_takes_no_memory_for_the_inputs_that_a_header_claims():
    layout = Layout("index out", padding_idx=2**40 - 3)
    record = LayerRecord("a", "bone", 2, None, 2**40 - 1, 1, 1.0, base=None, layout=layout)
    norm = delta_norm(record, torch.tensor([[3.0], [4.0]]))
    assert norm == math.sqrt(2**39 * 9 + (2**39 - 2) * 16)


def test_what_a_block_of_bat_does_is_not_known_without_its_weight(tmp_path):
    path = save(tmp_path / "a", target_regex="linear", method="bat")
    one = found_in(path)["linear.bat_block"]
    assert one.delta_norm is None
    assert one.norm > 0


def test_further_parameters_come_last_and_are_no_updates(tmp_path):
    path = save(tmp_path / "a", target_regex="linear", also_train=["^conv.bias", "^embed"])
    found = found_in(path)
    assert list(found) == ["linear.bone_block", "conv.bias", "embed.weight"]
    assert found["conv.bias"].norm == pytest.approx(float(every_kind().conv.bias.detach().norm()))
    assert found["conv.bias"].delta_norm is None


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_numbers_of_a_tensor(monkeypatch, chunk):
    monkeypatch.setattr(statistics, "CHUNK", chunk)
    values = torch.tensor([[3.0, 0.0, -4.0], [0.0, 0.0, 12.0]], dtype=torch.float16)
    one = tensor_statistics(values)
    assert (one.norm, one.largest, one.zeros, one.not_finite) == (13.0, 12.0, 3, 0)
    assert one.rms == pytest.approx(13 / math.sqrt(6))
    values[0, 0], values[0, 1] = float("nan"), float("-inf")
    one = tensor_statistics(values)
    assert (one.norm, one.rms, one.largest, one.zeros, one.not_finite) == (None, None, None, 2, 2)


def test_an_empty_tensor_has_no_norm_but_zero():
    one = tensor_statistics(torch.empty(0, 3))
    assert (one.norm, one.rms, one.largest, one.zeros, one.not_finite) == (0.0, 0.0, 0.0, 0, 0)


def test_squares_do_not_overflow_in_the_tensors_own_dtype():
    one = tensor_statistics(torch.full((4,), 6e4, dtype=torch.float16))
    assert one.norm == 2 * float(torch.tensor(6e4).half())
