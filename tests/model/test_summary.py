import torch
from torch import nn

import disha
from disha.text import table
from tests.conftest import Tied


def test_numbers_of_a_plain_model(model):
    summary = disha.summary(model)
    assert summary.trainable == summary.total == sum(p.numel() for p in model.parameters())
    assert summary.percent == 100.0
    assert str(summary).endswith("no adapters")


def test_numbers_after_injection(model):
    before = sum(p.numel() for p in model.parameters())
    disha.inject_adapters(model, "q_proj", 2, adapter="a", scale=0.5)
    disha.inject_adapters(model, "q_proj|head", 4, adapter="b", method="bat")
    summary = disha.summary(model)
    assert summary.total == before + 2 * (2 * 8) + 2 * (2 * 16) + 3 * 16
    assert summary.trainable == summary.total - before
    rows = [(row.name, row.adapter) for row in summary.layers]
    assert [(*row, row[::-1] in summary.active) for row in rows] == [
        ("layers.0.attn.q_proj", "a", False),
        ("layers.0.attn.q_proj", "b", True),
        ("layers.1.attn.q_proj", "a", False),
        ("layers.1.attn.q_proj", "b", True),
        ("head", "b", True),
    ]
    assert f"trainable {summary.trainable:,} of {summary.total:,}" in str(summary)


def test_tied_parameters_count_once():
    model = Tied()
    assert disha.summary(model).total == sum(p.numel() for p in model.parameters())


def test_a_lazy_module_counts_once_it_has_sizes():
    model = disha.inject_adapters(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)), "0", 2)
    assert disha.summary(model).total == 20 + 8
    model(torch.ones(1, 4))
    assert disha.summary(model).total == 20 + 8 + 20


def test_a_parameterless_model_is_no_division_by_zero():
    assert disha.summary(nn.ReLU()).percent == 0.0


def test_table_aligns_numbers_right_and_text_left():
    assert table(("a", "b", "c"), [("x", "1,000", "yes"), ("long", "2", "n")]) == (
        "a         b  c\nx     1,000  yes\nlong      2  n"
    )
