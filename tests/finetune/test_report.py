from __future__ import annotations

import json
import os
import stat

import pytest

from disha.finetune.errors import OutputError
from disha.finetune.report import (
    Sample,
    environment,
    peak_memory,
    samples_page,
    write_file,
)


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "report.json"
    write_file(path, b"old")
    write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_a_file_has_the_rights_that_any_new_file_has(tmp_path):
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "report.json", b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "report.json").stat().st_mode) == 0o640


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_file(path, b"old")

    def interrupt(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OutputError, match=r"report\.json can't be written: No such file"):
        write_file(tmp_path / "absent" / "report.json", b"")


def test_samples_keep_their_text_whatever_it_holds():
    sample = Sample("def f():\n    return '```'", "before", "````", "reference")
    page = samples_page([sample], "held-out")
    assert "````text\ndef f():\n    return '```'\n````" in page
    assert "`````text\n````\n`````" in page
    titles = [line for line in page.splitlines() if line.startswith("**")]
    assert titles == ["**Prompt**", "**Before**", "**After**", "**Reference**"]


def test_environment_is_json_with_versions_and_machine():
    found = json.loads(json.dumps(environment()))
    assert {"python", "disha", "torch", "gguf", "tokenizers"} <= found["versions"].keys()
    assert found["machine"]["threads"] >= 1


def test_peak_memory_is_in_bytes():
    peak = peak_memory()
    assert 50 * 2**20 < peak < 64 * 2**30
