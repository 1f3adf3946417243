from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from disha.finetune.errors import OutputError
from disha.finetune.report import (
    Sample,
    environment,
    loss_plot,
    metrics_line,
    open_metrics,
    peak_memory,
    samples_page,
    write_file,
)
from disha.finetune.training.loop import Step


def step(number, eval_loss=None):
    return Step(number, 1, 3.0 / number, 1e-3, 1.5, 40, 200.0, 0.2 * number, eval_loss)


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "report.json"
    write_file(path, b"old")
    write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


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


def test_metrics_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"metrics\.jsonl can't be written"):
        open_metrics(tmp_path / "file" / "metrics.jsonl")


def test_a_line_of_metrics_is_on_disk_when_it_is_complete(tmp_path):
    with open_metrics(tmp_path / "new" / "metrics.jsonl") as metrics:
        metrics.write(metrics_line(step(1)))
        metrics.write(metrics_line(step(2, eval_loss=2.5)))
        lines = (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line) for line in lines)
    assert first["step"] == 1
    assert "eval_loss" not in first
    assert second["eval_loss"] == 2.5
    assert {"loss", "learning_rate", "tokens_per_second", "seconds"} <= second.keys()


def test_the_plot_is_a_picture_with_both_curves():
    steps = [step(number) for number in range(1, 30)]
    png = loss_plot(steps, {0: 3.5, 15: 2.0, 29: 1.0}, "a title", "held-out")
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    assert picture.width >= 800
    colours = {colour for _, colour in picture.getcolors(maxcolors=2**24)}
    assert {(31, 119, 180), (255, 127, 14)} <= colours, "blue and orange are the two curves"


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
