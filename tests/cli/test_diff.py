from __future__ import annotations

import pytest
import torch

from disha.files.contents import read_contents, write_contents
from tests.cli.conftest import DOWN, Q


def test_the_same_adapter_is_0(run, files):
    a = files.adapter(also_train="norm")
    b = files.path / "b.safetensors"
    b.write_bytes(a.read_bytes())
    done = run("diff", a, b)
    assert (done.code, done.err) == (0, "")
    assert done.out == f"{a} and {b} hold the same adapter\n"
    found = run("diff", a, b, "--json")
    assert found.code == 0
    assert found.json["same"] is True
    assert all(one["same"] for one in found.json["layers"] + found.json["also_train"])


def test_other_numbers_are_1_and_shown(run, files):
    a, b = files.adapter("a"), files.path / "b"
    header, tensors = read_contents(a)
    tensors[f"{Q}.bone_block"][0, 0] += 0.5
    write_contents(b, header, tensors)
    done = run("diff", a, b)
    assert (done.code, done.err) == (1, "")
    rows = [line.split() for line in done.out.splitlines() if line.startswith("layers.")]
    assert [row[:2] for row in rows] == [[Q, "0.5"]]
    assert done.out.endswith("1 of 2 tensors differ; other fields that differ: 0\n")


def test_json_keys_stay(run, files):
    a = files.adapter("a", target_regex="q_proj", also_train="norm.weight")
    b = files.adapter("b", target_regex="_proj$", r=2, metadata={"task": "chat"})
    done = run("diff", a, b, "--json")
    assert done.code == 1
    assert done.json == {
        "first": str(a),
        "second": str(b),
        "same": False,
        "fields": [
            {"field": "r", "first": 4, "second": 2},
            {"field": "target", "first": "q_proj", "second": "_proj$"},
            {"field": "also_train", "first": ["norm.weight"], "second": []},
            {"field": "metadata.task", "first": None, "second": "chat"},
        ],
        "layers": [
            {
                "name": Q,
                "held": "both",
                "same": False,
                "fields": [
                    {"field": "r", "first": 4, "second": 2},
                    {"field": "shape", "first": [4, 8], "second": [2, 8]},
                ],
                "largest": None,
                "relative": None,
            },
            {
                "name": DOWN,
                "held": "second",
                "same": False,
                "fields": [],
                "largest": None,
                "relative": None,
            },
        ],
        "also_train": [
            {
                "name": "norm.weight",
                "held": "first",
                "same": False,
                "fields": [],
                "largest": None,
                "relative": None,
            }
        ],
    }
    told = run("diff", a, b).out
    assert f"only in {b}" in told
    assert "r: 4 | 2, shape: (4, 8) | (2, 8)" in told
    assert "metadata.task: None | chat" in told


def test_numbers_are_those_of_the_blocks(run, files):
    a, b = files.adapter("a"), files.adapter("b", seed=2)
    one = run("diff", a, b, "--json").json["layers"][0]
    x, y = (read_contents(path)[1][f"{Q}.bone_block"].double() for path in (a, b))
    assert one["largest"] == pytest.approx(float((x - y).abs().max()))
    assert one["relative"] == pytest.approx(
        float((x - y).norm() / torch.maximum(x.norm(), y.norm()))
    )


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("content", [None, b"nothing"])
def test_trouble_is_2(run, files, order, content):
    bad = files.path / "bad"
    if content is not None:
        bad.write_bytes(content)
    pair = (files.adapter(), bad)
    done = run("diff", *(pair[place] for place in order))
    assert done.code == 2
    assert str(bad) in done.complaint
