from __future__ import annotations

import pytest
import torch

import disha
from disha.files.contents import read_contents, write_contents
from tests.cli.conftest import DOWN, Q


def test_the_table_is_the_librarys(run, files):
    path = files.adapter(metadata={"task": "chat"})
    done = run("inspect", path)
    assert (done.code, done.err) == (0, "")
    assert done.out == f"{disha.inspect_adapter(path)}\n"


def test_a_scale_is_shown_if_it_is_not_1(run, files):
    usual, scaled = run("inspect", files.adapter()), run("inspect", files.adapter(scale=0.25))
    assert "scale" not in usual.out.splitlines()[0]
    header, first, *_ = scaled.out.splitlines()
    assert (header.split()[-1], first.split()[-1]) == ("scale", "0.25")


def test_no_tensor_is_read_unless_asked_for(run, files, monkeypatch):
    from disha.files.tensors import TensorFile

    def refuse(self, key):
        raise AssertionError(f"{key} is read")

    path = files.adapter()
    monkeypatch.setattr(TensorFile, "read", refuse)
    assert run("inspect", path).code == run("inspect", path, "--json").code == 0
    found = run("inspect", path, "--stats")
    assert found.code == 2
    assert "is read" in found.err


def test_json_has_everything_and_its_keys_stay(run, files):
    path = files.adapter(also_train="norm.weight", r_out=2, metadata={"task": "chat"})
    found = run("inspect", path, "--json").json
    described = disha.inspect_adapter(path)
    assert found["config"] == described.config.to_json()
    layers = found.pop("layers")
    del found["config"]
    assert found == {
        "path": str(path),
        "format": 1,
        "bytes": path.stat().st_size,
        "parameters": 2 * 4 * 2 + 12,
        "also_train": [
            {"name": "norm.weight", "key": "norm.weight", "shape": [12], "dtype": "float32"}
        ],
        "metadata": {"task": "chat"},
    }
    assert [layer.pop("base") for layer in layers] == [one.base for one in described.layers]
    assert layers[0] == {
        "name": Q,
        "method": "bone",
        "r": 4,
        "r_out": 2,
        "in_features": 16,
        "out_features": 8,
        "scale": 1.0,
        "layout": "out in",
        "groups": 1,
        "padding_idx": None,
        "rows": [],
        "key": f"{Q}.bone_block",
        "shape": [4, 2],
        "dtype": "float32",
    }


def test_statistics(run, files):
    path = files.adapter(also_train="norm.weight", metadata={"task": "chat"})
    block = read_contents(path)[1][f"{DOWN}.bone_block"].double()
    found = run("inspect", path, "--stats", "--json").json
    one = next(layer for layer in found["layers"] if layer["name"] == DOWN)["stats"]
    assert one["norm"] == pytest.approx(float(block.norm()))
    assert one["largest"] == float(block.abs().max())
    assert one["delta_norm"] == pytest.approx(2 * float(block.norm()))  # 16 inputs, r = 4
    assert (one["zeros"], one["not_finite"]) == (0, 0)
    assert found["also_train"][0]["stats"]["norm"] == pytest.approx(12**0.5)
    told = run("inspect", path, "--stats").out
    row = next(line for line in told.splitlines() if line.startswith(DOWN)).split()
    assert row[1:3] == ["4x12", f"{float(block.norm()):.4g}"]
    assert row[5] == f"{2 * float(block.norm()):.4g}"
    assert told.splitlines()[-3:] == str(disha.inspect_adapter(path)).splitlines()[-3:]


def test_numbers_that_json_lacks_are_null(run, files):
    path = files.adapter()
    header, tensors = read_contents(path)
    tensors[f"{Q}.bone_block"][0, 0] = torch.inf
    write_contents(path, header, tensors)
    one = run("inspect", path, "--stats", "--json").json["layers"][0]["stats"]
    assert one["norm"] is one["rms"] is one["largest"] is one["delta_norm"] is None
    assert one["not_finite"] == 1
    assert run("inspect", path, "--stats").out.splitlines()[1].endswith("1")


@pytest.mark.parametrize("content", [None, b"", b"GGUF", b"\0" * 100])
def test_bad_input(run, files, content):
    path = files.path / "bad"
    if content is not None:
        path.write_bytes(content)
    done = run("inspect", path)
    assert done.code == 2
    assert str(path) in done.complaint


HOSTILE = "a\x1b[2J\u202eb\r\nx is sound"


def test_names_and_notes_of_strangers_do_nothing_to_a_terminal(run, files):
    from dataclasses import replace

    path = files.adapter(target_regex="q_proj")
    header, tensors = read_contents(path)
    [layer] = header.layers
    layer = replace(layer, name=HOSTILE)
    header = replace(
        header,
        layers=(layer,),
        tensors={layer.key: header.tensors[f"{Q}.bone_block"]},
        metadata={"note": HOSTILE},
    )
    write_contents(path, header, {layer.key: tensors[f"{Q}.bone_block"]})
    for command in (("inspect", path), ("inspect", path, "--stats"), ("verify", path)):
        told = run(*command).out
        assert not {"\x1b", "\u202e", "\r"} & set(told)
    assert r"a\x1b[2J\u202eb\r\nx is sound  bone" in run("inspect", path).out
    assert run("inspect", path, "--json").json["layers"][0]["name"] == HOSTILE
    refused = run("merge", files.base(), path, files.path / "out")
    assert (refused.code, refused.complaint.isascii()) == (2, True)
