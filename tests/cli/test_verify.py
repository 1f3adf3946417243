from __future__ import annotations

import pytest
import torch

from disha.files.contents import read_contents, write_contents
from tests.cli.conftest import DOWN, Q


def states(done):
    return {one["check"]: one["passed"] for one in done.json["checks"]}


def test_a_sound_file_is_0(run, files):
    path = files.adapter()
    done = run("verify", path)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[-1] == f"{path} is sound"
    found = run("verify", path, "--json")
    assert found.json == {
        "path": str(path),
        "sound": True,
        "checks": [
            {
                "check": "structure",
                "passed": True,
                "remark": "format 1, 2 layers, 80 parameters",
            },
            {"check": "values", "passed": True, "remark": "all finite"},
        ],
        "base": None,
    }


def test_against_its_base(run, files):
    base, path = files.base(), files.adapter(also_train="norm.weight")
    done = run("verify", path, "--base", base, "--json")
    assert done.code == 0
    assert states(done) == {"structure": True, "values": True, "base": True}
    assert done.json["base"] == {
        "path": str(base),
        "layers": [
            {"name": name, "key": f"{name}.weight", "state": "same base", "remark": ""}
            for name in (Q, DOWN)
        ],
        "also_train": [
            {"name": "norm.weight", "key": "norm.weight", "state": "fits", "remark": ""}
        ],
    }


def test_another_base_is_1_and_named(run, files):
    done = run("verify", files.adapter(base=7), "--base", files.base())
    assert (done.code, done.err) == (1, "")
    assert f"{Q}" in done.out
    assert "other base" in done.out
    assert "WRONG" in done.out
    assert done.out.endswith("is not sound\n")


def test_values_that_are_not_finite_are_1(run, files):
    path = files.adapter()
    header, tensors = read_contents(path)
    tensors[f"{DOWN}.bone_block"][1, 1:3] = torch.nan
    write_contents(path, header, tensors)
    done = run("verify", path, "--json")
    assert done.code == 1
    assert states(done) == {"structure": True, "values": False}
    assert done.json["checks"][1]["remark"] == f"not finite in {DOWN}.bone_block (2)"


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def foreign(path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, path)


def newer(path):
    path.write_bytes(path.read_bytes().replace(b'\\"format\\":1', b'\\"format\\":9'))


@pytest.mark.parametrize("damage", [cut, foreign, newer])
def test_a_damaged_file_is_1_and_nothing_more_is_looked_at(run, files, damage):
    path = files.adapter()
    damage(path)
    done = run("verify", path, "--base", files.base(), "--json")
    assert (done.code, done.err) == (1, "")
    assert states(done) == {"structure": False}
    assert "\n" not in done.json["checks"][0]["remark"]


@pytest.mark.parametrize("which", ["file", "base"])
def test_what_can_not_be_looked_at_is_2(run, files, which):
    absent = files.path / "absent"
    given = {"file": (absent,), "base": (files.adapter(), "--base", absent)}[which]
    done = run("verify", *given)
    assert done.code == 2
    assert str(absent) in done.complaint
