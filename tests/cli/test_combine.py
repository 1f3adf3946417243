from __future__ import annotations

import pytest
import torch

import disha
from disha.files.contents import read_contents
from tests.cli.conftest import DOWN, Q, model


def test_the_sum_acts_as_the_sum(run, files):
    a, b = files.adapter("a", seed=1), files.adapter("b", seed=2, r=6, target_regex="q_proj")
    out = files.path / "sum.safetensors"
    done = run("combine", "--adapter", f"{a}=0.3", "--adapter", f"{b}=-1e0", out)
    assert (done.code, done.err) == (0, "")
    assert done.out == f"{disha.inspect_adapter(out)}\n"
    adapted = model()
    for name, path in (("a", a), ("b", b), ("sum", out)):
        disha.load_adapter(adapted, path, name)
    layer = adapted.layers[0].self_attn.q_proj
    delta = {name: layer.delta_weight(layer.disha[name]) for name in ("a", "b", "sum")}
    torch.testing.assert_close(delta["sum"], 0.3 * delta["a"] - delta["b"], rtol=0, atol=1e-6)


def test_one_order_or_another_gives_the_same_file(run, files):
    a, b = files.adapter("a", seed=1), files.adapter("b", seed=2)
    x, y = files.path / "x", files.path / "y"
    run("combine", "--adapter", f"{a}=0.3", "--adapter", f"{b}=0.7", x)
    run("combine", y, "--adapter", f"{b}=0.7", "--adapter", f"{a}=0.3")
    assert run("diff", x, y).code == 0


def test_json_keys_stay(run, files):
    a, out = files.adapter("a=b"), files.path / "out"
    assert run("combine", "--adapter", f"{a}=2", out, "--json").json == {
        "path": str(out),
        "adapters": [{"path": str(a), "weight": 2.0}],
        "layers": 2,
        "parameters": 80,
        "bytes": out.stat().st_size,
    }
    doubled, tensors = read_contents(out)[1], read_contents(a)[1]
    assert all(torch.equal(doubled[key], 2 * tensors[key]) for key in tensors)


def test_further_parameters_are_left_out_if_asked(run, files):
    a, out = files.adapter(also_train="norm"), files.path / "out"
    done = run("combine", "--adapter", f"{a}=1", out)
    assert done.code == 2
    assert "--no-also-train" in done.complaint
    assert not out.exists()
    assert run("combine", "--adapter", f"{a}=1", out, "--no-also-train").code == 0
    assert set(read_contents(out)[1]) == {f"{Q}.bone_block", f"{DOWN}.bone_block"}


def test_another_base_is_a_warning(run, files):
    a, b = files.adapter("a"), files.adapter("b", base=3)
    done = run("combine", "--adapter", f"{a}=1", "--adapter", f"{b}=1", files.path / "out")
    assert done.code == 0
    assert done.err.startswith("disha: warning: the adapters were saved from different base")
    assert done.err.count("\n") == 1


def test_what_is_there_stays_unless_told(run, files):
    a, out = files.adapter(), files.path / "out"
    out.write_text("mine")
    done = run("combine", "--adapter", f"{a}=1", out)
    assert done.code == 2
    assert "--overwrite" in done.complaint
    assert out.read_text() == "mine"
    assert run("combine", "--adapter", f"{a}=1", out, "--overwrite").code == 0
    assert run("combine", "--adapter", f"{a}=1", a, "--overwrite").code == 0
    assert read_contents(a)[1].keys() == read_contents(out)[1].keys()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "no --adapter FILE=WEIGHT was given"),
        (("a",), "must be FILE=WEIGHT"),
        (("a=x",), "must be FILE=WEIGHT"),
        (("=1",), "must be FILE=WEIGHT"),
        (("a=nan",), "finite"),
        (("absent=1",), "absent"),
        (("a=1", "bat=1"), "different methods"),
        (("folder=1",), "it is a folder"),
    ],
)
def test_bad_input(run, files, monkeypatch, words, says):
    files.adapter("a")
    files.adapter("bat", method="bat")
    (files.path / "folder").mkdir()
    monkeypatch.chdir(files.path)
    before = files.names()
    given = [part for word in words for part in ("--adapter", word)]
    done = run("combine", *given, "out")
    assert done.code == 2
    assert says in done.complaint
    assert files.names() == before


def test_a_folder_that_is_not_there_is_2(run, files):
    done = run("combine", "--adapter", f"{files.adapter()}=1", files.path / "absent" / "out")
    assert done.code == 2
    assert "create it first" in done.complaint
