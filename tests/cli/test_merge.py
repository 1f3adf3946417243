from __future__ import annotations

import io
import sys

import pytest
import torch
from safetensors.torch import load_file

import disha
from disha.cli import output
from tests.cli.conftest import DOWN, Q, model


def merged(path, scale=None, dtype=torch.float32):
    adapted = model()
    disha.load_adapter(adapted, path)
    if scale is not None:
        disha.set_adapter_scale(adapted, scale)
    disha.merge_adapters(adapted)
    return {
        key: value.to(dtype)
        for key, value in adapted.state_dict().items()
        if not key.endswith("_block")
    }


def same(found, expected):
    assert found.keys() == expected.keys()
    return all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_folder_becomes_a_folder(run, files):
    base, adapter, out = files.base(config={"heads": 2}), files.adapter(), files.path / "out"
    done = run("merge", base, adapter, out)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"{out}: 2 layers merged")
    assert same(load_file(out / "model.safetensors"), merged(adapter))
    assert (out / "config.json").read_text() == (base / "config.json").read_text()


def test_a_file_with_another_scale_and_dtype(run, files):
    base, adapter, out = files.base(), files.adapter(), files.path / "out.safetensors"
    given = ("merge", base / "model.safetensors", adapter, out, "--scale", 0.5)
    assert run(*given, "--dtype", "bfloat16").code == 0
    assert same(load_file(out), merged(adapter, 0.5, torch.bfloat16))


def test_json_keys_stay(run, files):
    base, out = files.base(config={}), files.path / "out"
    adapter = files.adapter(also_train="norm.weight")
    assert run("merge", base, adapter, out, "--json").json == {
        "path": str(out),
        "layers": [Q, DOWN],
        "replaced": ["norm.weight"],
        "files": ["config.json", "model.safetensors"],
        "left_out": [],
        "bytes": 4 * (8 * 16 + 12 * 16 + 24),
    }


def test_further_parameters_are_left_alone_if_asked(run, files):
    base, adapter, out = files.base(), files.path / "a.safetensors", files.path / "out"
    trained = disha.inject_adapters(model(), target_regex="q_proj", r=4, also_train="norm.weight")
    with torch.no_grad():
        trained.norm.weight.mul_(3)
    disha.save_adapter(trained, adapter)
    norms = []
    for flags in ((), ("--no-also-train",)):
        done = run("merge", base, adapter, out, "--overwrite", "--json", *flags)
        norms.append((done.json["replaced"], load_file(out / "model.safetensors")["norm.weight"]))
    assert [replaced for replaced, _ in norms] == [["norm.weight"], []]
    assert torch.equal(norms[0][1], 3 * model().norm.weight)
    assert torch.equal(norms[1][1], model().norm.weight)


def test_another_base_is_refused_unless_forced(run, files):
    base, adapter, out = files.base(), files.adapter(base=4), files.path / "out"
    before = files.names()
    done = run("merge", base, adapter, out)
    assert done.code == 2
    assert "merge with --force" in done.complaint
    assert files.names() == before
    assert run("merge", base, adapter, out, "--force").code == 0


def test_what_is_there_stays_unless_told(run, files):
    base, adapter, out = files.base(), files.adapter(), files.path / "out"
    assert run("merge", base, adapter, out).code == 0
    before = (out / "model.safetensors").read_bytes()
    done = run("merge", base, adapter, out, "--scale", 2)
    assert done.code == 2
    assert "--overwrite" in done.complaint
    assert (out / "model.safetensors").read_bytes() == before
    assert run("merge", base, adapter, out, "--scale", 2, "--overwrite").code == 0
    assert (out / "model.safetensors").read_bytes() != before


@pytest.mark.parametrize(
    ("base", "adapter", "flags"),
    [
        ("absent", "a", ()),
        ("base", "absent", ()),
        ("a", "base/model.safetensors", ()),
        ("base", "a", ("--scale", "nan")),
    ],
)
def test_bad_input(run, files, base, adapter, flags):
    files.base()
    files.adapter("a")
    before = files.names()
    done = run("merge", files.path / base, files.path / adapter, files.path / "out", *flags)
    assert done.code == 2
    assert done.complaint
    assert files.names() == before


@pytest.mark.parametrize("flags", [("--scale", "large"), ("--dtype", "int8")])
def test_wrong_usage(run, flags):
    done = run("merge", "base", "a", "out", *flags)
    assert done.code == 2
    assert flags[1] in done.complaint


# --- progress ------------------------------------------------------------------------------------


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_only(files, monkeypatch, terminal):
    screen = Screen() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setitem(output._BAR, "delay", 0)
    base, adapter, out = files.base(), files.adapter(), files.path / "out"
    assert disha.cli.main(["merge", str(base), str(adapter), str(out)]) == 0
    assert disha.cli.main(["inspect", str(adapter), "--stats"]) == 0
    shown = screen.getvalue()
    assert ("merging" in shown) == ("reading tensors" in shown) == terminal
    assert shown == "" or terminal


def test_nothing_is_shown_before_its_time(files, monkeypatch):
    assert output._BAR["delay"] == 1
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setitem(output._BAR, "delay", 3600)
    assert disha.cli.main(["inspect", str(files.adapter()), "--stats"]) == 0
    assert screen.getvalue() == ""
