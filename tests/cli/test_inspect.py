import pytest

import disha
from disha.files.contents import read_contents, write_contents
from tests.cli.conftest import DOWN, Q


def test_the_table_is_the_librarys(run, files):
    path = files.adapter(metadata={"task": "chat"})
    done = run("inspect", path)
    assert (done.code, done.err) == (0, "")
    assert done.out == f"{disha.inspect_adapter(path)}\n"


@pytest.mark.parametrize(("scale", "shown"), [(1.0, "1"), (0.25, "0.25")])
def test_the_scale_of_each_layer_is_shown(run, files, scale, shown):
    header, first, *_ = run("inspect", files.adapter(scale=scale)).out.splitlines()
    assert (header.split()[-1], first.split()[-1]) == ("scale", shown)


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
        "misfits": [],
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
        "kernel": [],
        "tied": [],
        "key": f"{Q}.bone_block",
        "shape": [4, 2],
        "dtype": "float32",
    }


def test_against_its_base(run, files):
    base, path = files.base(), files.adapter(also_train="norm.weight")
    done = run("inspect", path, "--base", base)
    assert (done.code, done.err) == (0, "")
    assert done.out.endswith(f"{path} belongs to {base}\n")


def test_another_base_is_1_and_named(run, files):
    path, base = files.adapter(base=7), files.base()
    done = run("inspect", path, "--base", base)
    assert (done.code, done.err) == (1, "")
    assert f"\n{Q}.weight and 1 more: has other values than the weight" in done.out
    assert done.out.endswith(f"{path} does not belong to {base}\n")
    found = run("inspect", path, "--base", base, "--json")
    assert found.code == 1
    assert any(DOWN in one for one in found.json["misfits"])


def test_an_absent_base_is_2(complaint, files):
    assert "absent" in complaint("inspect", files.adapter(), "--base", files.path / "absent")


@pytest.mark.parametrize("content", [None, b"", b"GGUF", b"\0" * 100])
def test_bad_input(complaint, files, content):
    path = files.path / "bad"
    if content is not None:
        path.write_bytes(content)
    assert str(path) in complaint("inspect", path)


HOSTILE = "a\x1b[2J\u202eb\r\nx is sound"


def test_names_and_notes_of_strangers_do_nothing_to_a_terminal(run, files):
    from dataclasses import replace

    path = files.adapter(target_regex="q_proj")
    contents = read_contents(path)
    [layer] = contents.layers
    layer = replace(layer, name=HOSTILE)
    contents = replace(
        contents,
        layers=(layer,),
        tensors={layer.key: contents.tensors[f"{Q}.bone_block"]},
        metadata={"note": HOSTILE},
    )
    write_contents(path, contents)
    assert not {"\x1b", "\u202e", "\r"} & set(run("inspect", path).out)
    assert r"a\x1b[2J\u202eb\r\nx is sound  bone" in run("inspect", path).out
    assert run("inspect", path, "--json").json["layers"][0]["name"] == HOSTILE
    refused = run("merge", files.base(), path, files.path / "out")
    assert (refused.code, refused.complaint.isascii()) == (2, True)


def test_a_folder_of_peft(run, files):
    folder = files.path / "lora"
    assert run("convert", files.adapter(), folder, "--to", "lora").code == 0
    shown = run("inspect", folder, "--base", files.base()).out
    assert f"{folder}: a folder of PEFT, 2 layers" in shown
    assert f"{folder} belongs to" in shown
