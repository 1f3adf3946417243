"""Adapters outside a model: what is read from a file, and parts of it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import disha
from disha.files import BlockSpec
from disha.files.contents import keep_blocks, keep_matching, read_contents
from disha.files.saving import adapter_contents
from disha.functional import Layout
from disha.model.view import ModelView
from tests.adapter_files import trained
from tests.conftest import seed_torch


class TestInspect:
    def test_says_what_is_in_the_file(self, path):
        model = trained(rank_pattern={"head": 2})
        disha.save_adapter(model, path, metadata={"task": "docs"})
        described = disha.inspect_adapter(path)
        head = next(layer for layer in described.layers if layer.name == "head")
        assert (head.method, head.r, head.r_out, head.in_features, head.out_features) == (
            "bone", 2, None, 8, 12)  # fmt: skip
        assert described.format == 1
        assert described.config == model.head.disha["default"].config
        assert described.also_train == ("layers.0.attn.norm.weight", "layers.1.attn.norm.weight")
        assert described.tensors["head.bone_block"].shape == (2, 12)
        assert described.tensors["head.bone_block"].nbytes == 96
        assert described.metadata == {"task": "docs"}
        assert described.nbytes == path.stat().st_size
        assert described.parameters == sum(
            p.numel() for p in disha.adapter_state_dict(model).values()
        )
        text = str(described)
        assert "head" in text
        assert "2x12" in text
        assert "task: docs" in text

    def test_the_whole_text(self, path):
        seed_torch(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 12)).half()
        options = {"also_train": "bias", "rank_pattern": {"1": 3}, "dtype": torch.float16}
        disha.inject_adapters(model, ".", 2, scale=0.5, **options)
        disha.save_adapter(model, path, metadata={"task": "docs"})
        assert str(disha.inspect_adapter(path)).splitlines() == [
            "layer  method  r  in -> out  block  dtype    scale",
            "0      bone    2  4 -> 6     2x6    float16    0.5",
            "1      bone    3  6 -> 12    3x12   float16    0.5",
            "also trained: 0.bias, 1.bias",
            "task: docs",
            f"{path}: format 1, 2 layers, 66 parameters, {path.stat().st_size:,} bytes",
        ]

    def test_the_layer_that_is_the_model(self, path):
        disha.save_adapter(disha.inject_adapters(nn.Linear(4, 6), "all-linear", 2), path)
        assert str(disha.inspect_adapter(path)).splitlines()[1].startswith("(the model)  bone")

    def test_reads_no_tensor(self, saved, path):
        size = path.stat().st_size
        header = int.from_bytes(path.read_bytes()[:8], "little") + 8
        with open(path, "r+b") as file:  # a hole in place of the data
            file.truncate(header)
            file.truncate(size)
        block = disha.inspect_adapter(path).tensors["head.bone_block"]
        assert (block.shape, block.is_meta) == ((3, 12), True)

    def test_overhead_is_small(self, path):
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(300)))
        disha.inject_adapters(model, "all-linear", 2)
        disha.save_adapter(model, path)
        tensors = sum(p.numel() * 4 for p in disha.adapter_parameters(model))
        assert path.stat().st_size - tensors <= 4096 + 200 * 300


def test_keep_blocks():
    contents = adapter_contents(ModelView(trained()), with_fingerprints=False)
    assert {layer.base for layer in contents.layers} == {None}
    without = keep_blocks(contents)
    assert contents.also_train
    assert contents.config.also_train
    assert (without.also_train, without.config.also_train) == ((), ())
    assert without.config == replace(contents.config, also_train=())
    assert without.layers == contents.layers
    keys = [layer.key for layer in contents.layers]
    assert list(without.tensors) == keys
    assert all(without.tensors[key] is contents.tensors[key] for key in keys)


def test_some_layers_are_read(saved, path):
    contents = keep_blocks(keep_matching(read_contents(path), "head", path))
    assert [layer.name for layer in contents.layers] == ["head"]
    assert list(contents.tensors) == ["head.bone_block"]


@pytest.mark.parametrize(
    ("rows", "shape", "due"),
    [
        ((), (8, 8), None),
        ((), (8, 9), "(8, 8)"),
        (((4, 8),), (8, 8), None),
        (((4, 8),), (12, 8), None),
        (((4, 8),), (6, 8), "(4, 8) in rows 4:8"),
        (((0, 2), (4, 6)), (8, 8, 1), "(4, 8) in rows 0:2, 4:6"),
    ],
)
def test_a_weight_of_another_shape_is_not_the_layer_s(rows, shape, due):
    outputs = 4 if rows else 8
    layer = BlockSpec.of_block(
        "x",
        (2, outputs),
        method="bone",
        r=2,
        in_features=8,
        out_features=outputs,
        layout=Layout("out in"),
        outputs=rows,
    )
    says = due and f"the weight has the shape {shape}; the adapter is for {due}"
    assert layer.reason_against_shape(shape) == says
