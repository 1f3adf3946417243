"""The benchmark of the fine-tuning command, on one layer, and the page that is made of it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import finetuning, finetuning_report
from benchmarks.protocol import Budget
from benchmarks.results import describe, write_results
from disha.finetune.metrics import Metrics

TINY = replace(finetuning.QUICK, length=8, accumulation=2, budget=Budget(0.0, 2, 2, 1))

RUN = {
    "title": "Bone",
    "flags": [],
    "steps": 60,
    "before": 3.8368,
    "after": 2.9142,
    "trainable": 9_953_280,
    "peak_memory_bytes": 2**31,
}


@pytest.fixture(scope="module")
def case():
    return finetuning.loop(TINY, torch.device("cpu"))


def results(case, runs=(RUN,)):
    found = describe("full", torch.device("cpu"))
    found["tables"] = {"loop": [case], "runs": list(runs)}
    return found


def test_both_ways_are_timed_as_often(case):
    assert {name: len(times) for name, times in case["seconds"].items()} == {"bare": 2, "loop": 2}
    assert all(time > 0 for times in case["seconds"].values() for time in times)


def test_a_bare_step_updates_the_blocks_as_a_step_of_the_loop_does():
    # Otherwise the comparison would be unfair.
    cpu = torch.device("cpu")
    for make in (
        lambda: finetuning.bare_step(TINY, cpu),
        lambda: finetuning.loop_step(TINY, cpu, Metrics(None)),
    ):
        seen = []
        original = torch.optim.AdamW.step

        def stepping(self, *given, seen=seen, original=original, **named):
            grads = [p.grad for group in self.param_groups for p in group["params"]]
            seen.append(sum(float(g.abs().sum()) for g in grads if g is not None))
            return original(self, *given, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", stepping)
            make()()
        assert len(seen) == 1
        assert seen[0] > 0


@pytest.mark.parametrize(("slower", "verdict"), [(1.02, "met"), (1.08, "**missed**")])
def test_the_page_says_whether_the_loop_keeps_its_limit(case, slower, verdict):
    timed = {**case, "seconds": {"bare": [1.0, 1.0], "loop": [slower, slower]}}
    text = finetuning_report.page(results(timed))
    assert f"**{slower:.3f}**, limit 1.053: {verdict}." in text


def test_the_page_shows_every_run(case):
    other = {**RUN, "title": "BAT", "after": 2.85}
    text = finetuning_report.page(results(case, (RUN, other)))
    assert "| Bone | 60 | 3.837 | 2.914 | 9,953,280 | 2 GiB |" in text
    assert "| BAT | 60 | 3.837 | 2.850 |" in text


def test_the_command_writes_the_page(case, tmp_path, capsys):
    path = tmp_path / "results.json"
    write_results(path, results(case))
    command = [sys.executable, "-m", "benchmarks.finetuning_report"]
    subprocess.run([*command, str(path), "--docs", str(tmp_path / "docs")], check=True)
    assert (tmp_path / "docs" / "finetuning-results.md").read_text() == finetuning_report.page(
        json.loads(path.read_text())
    )
    assert finetuning_report.main([str(tmp_path / "absent.json")]) == 2
    assert "can't be read" in capsys.readouterr().err


def test_what_the_file_has_already_is_kept(case, tmp_path, monkeypatch):
    path, measured = tmp_path / "results.json", []
    write_results(path, results(case, [RUN]))

    def end_to_end(run, profile):
        measured.append(run.title)
        return {**RUN, "title": run.title}

    monkeypatch.setattr(finetuning, "end_to_end", end_to_end)
    monkeypatch.setattr(finetuning, "loop", lambda profile, device: pytest.fail("measured again"))
    assert finetuning.main(["--go_on", "--out", str(path)]) == 0
    titles = [run["title"] for run in json.loads(path.read_text())["tables"]["runs"]]
    assert measured == ["BAT", "QBone, 8 bits", "QBone, 4 bits (nf4)"]
    assert titles == ["Bone", *measured]


def test_the_page_in_the_docs_is_made_of_the_newest_results():
    newest = max(Path("benchmarks/results").glob("*-finetuning.json"))
    page = finetuning_report.page(json.loads(newest.read_text()))
    assert Path("docs/finetuning-results.md").read_text() == page
    runs = json.loads(newest.read_text())["tables"]["runs"]
    assert [run["title"] for run in runs] == [run.title for run in finetuning.RUNS]
    assert all(run["after"] < run["before"] for run in runs)
