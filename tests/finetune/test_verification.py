from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from disha.finetune.data.encoding import Tally
from disha.finetune.data.examples import StoredExamples
from disha.finetune.errors import VerificationError
from disha.finetune.inputs import Checked
from disha.finetune.settings import FinetuneSettings
from disha.finetune.verification import (
    EXACT,
    ROUNDED,
    Tolerance,
    Verification,
    verify_in_fresh_process,
)
from tests.finetune.command_line import with_values

GOOD = Verification(
    trained=2.0,
    loaded=2.00005,
    merged=1.9995,
    tolerance=Tolerance(loaded=1e-4, merged=1e-3),
    peak_memory_bytes=None,
)


def test_differences_are_distances_from_the_trained_model():
    assert GOOD.loaded_difference == pytest.approx(5e-5)
    assert GOOD.merged_difference == pytest.approx(5e-4)
    assert GOOD.agrees
    GOOD.require_agreement(Path("a.safetensors"))


@pytest.mark.parametrize("changes", [{"loaded": 2.001}, {"merged": 1.9}, {"loaded": float("nan")}])
def test_a_disagreement_names_file_losses_and_tolerance(changes):
    with pytest.raises(VerificationError, match=r"a\.safetensors, loaded in a new") as caught:
        replace(GOOD, **changes).require_agreement(Path("a.safetensors"))
    assert "2.000000" in str(caught.value)
    assert "tolerance 0.0001" in str(caught.value)


def test_what_the_report_holds():
    found = GOOD.to_json()
    assert found["agrees"] is True
    assert found["loaded_difference"] == GOOD.loaded_difference
    assert found["tolerance"] == {"loaded": 1e-4, "merged": 1e-3}


def test_a_loss_that_is_no_number_is_null_in_the_report():
    """The report is written before the command says that the losses disagree."""
    found = replace(GOOD, loaded=float("nan")).to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["loaded"], found["loaded_difference"], found["agrees"]) == (None, None, False)
    assert found["merged"] == GOOD.merged


@pytest.fixture
def settings(tmp_path, tiny_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"query": "a", "response": "b"}\n')
    return with_values(
        FinetuneSettings(),
        base_model_name_or_path=tiny_path,
        output_dir=tmp_path,
        data_path=(data,),
        max_seq_length=64,
    )


def inputs(*examples):
    rows = Checked("held-out", StoredExamples(examples), True, Tally())
    return SimpleNamespace(checked=rows, now=None)


def test_a_fresh_process_that_fails_is_quoted(tmp_path, settings):
    with pytest.raises(VerificationError, match=r"failed with code 1: .*absent\.safetensors"):
        verify_in_fresh_process(settings, tmp_path / "absent.safetensors", inputs(), 1.0)


def answering(monkeypatch, **found):
    """Let the fresh process find something, without the seconds that it takes to start."""
    said = json.dumps({"loaded": 5.0, "merged": 5.01, "peak_memory_bytes": None, **found})
    done = subprocess.CompletedProcess([], 0, said.encode(), b"")
    monkeypatch.setattr(subprocess, "run", lambda *words, **options: done)


def test_data_that_changed_meanwhile_are_named(tmp_path, settings, monkeypatch):
    answering(monkeypatch, rows="others")
    with pytest.raises(VerificationError, match="the data have changed since training began"):
        verify_in_fresh_process(settings, tmp_path / "a.safetensors", inputs(), 5.0)


@pytest.mark.parametrize(
    ("changes", "tolerance"), [({}, EXACT), ({"bf16": True}, ROUNDED), ({"bits": "8"}, ROUNDED)]
)
def test_products_in_bfloat16_may_differ_as_bfloat16_does(
    tmp_path, settings, monkeypatch, changes, tolerance
):
    """Whatever the weights are kept in: merged ones are rounded to it."""
    answering(monkeypatch, rows=inputs().checked.rows.digest())
    settings = with_values(settings, **changes)
    found = verify_in_fresh_process(settings, tmp_path / "a.safetensors", inputs(), 5.0)
    assert found.tolerance == tolerance
