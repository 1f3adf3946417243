from __future__ import annotations

import io
import json
import subprocess
import sys
import time

import pytest
from PIL import Image

import disha
from disha.finetune import report
from disha.finetune.report import (
    Sample,
    environment,
    peak_memory,
    plot_learning_rates,
    plot_losses,
    samples_page,
    write_figure,
    write_text,
)
from disha.finetune.training.loop import Step


def test_files_take_their_place_when_they_are_complete(tmp_path):
    path = tmp_path / "page.md"
    for text in ("old", "n\u00e9w"):
        write_text(path, text)
    assert path.read_bytes() == "n\u00e9w".encode()
    write_figure(tmp_path / "plot.png", plot_learning_rates([], "a title"))
    assert Image.open(tmp_path / "plot.png").width >= 800
    assert {one.name for one in tmp_path.iterdir()} == {"page.md", "plot.png"}


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(disha.AdapterIOError, match=r"report\.json: the folder .* does not exist"):
        write_text(tmp_path / "absent" / "report.json", "")


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


def test_a_package_without_a_version_is_no_error(monkeypatch):
    """A run without GGUF files does not need gguf, and the report comes after training."""
    monkeypatch.setattr(report, "REPORTED_PACKAGES", ("torch", "not-installed-at-all"))
    versions = environment()["versions"]
    assert versions["torch"]
    assert versions["not-installed-at-all"] is None


def test_the_name_of_a_model_is_no_formula(tmp_path):
    write_figure(tmp_path / "plot.png", plot_learning_rates([], r"on $\nonsense{$"))
    assert Image.open(tmp_path / "plot.png").width >= 800


def test_peak_memory_is_that_of_the_process_alone():
    """Not that of the process that started it."""
    kept = bytearray(b"1") * 2**29
    code = "from disha.finetune.report import peak_memory; print(peak_memory())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    own = peak_memory()
    assert own > len(kept)
    assert int(told.stdout) < own - len(kept) / 2


def test_peak_memory_is_in_bytes():
    peak = peak_memory()
    assert 50 * 2**20 < peak < 64 * 2**30


# --- plots ----------------------------------------------------------------------------------------

BLUE, ORANGE = (31, 119, 180), (255, 127, 14)
STEPS = [
    Step(number, 1, 3.0 / number, 1e-3 / number, 1.5, 40, 200.0, 0.2 * number, None)
    for number in range(1, 30)
]


def colours(figure):
    png = io.BytesIO()
    figure.savefig(png, format="png")
    picture = Image.open(png).convert("RGB")
    assert picture.width >= 800
    return {colour: count for count, colour in picture.getcolors(maxcolors=2**24)}


def test_the_plot_of_losses_has_both_curves():
    found = colours(plot_losses(STEPS, {0: 3.5, 15: 2.0, 29: 1.0}, "a title", "held-out"))
    assert {BLUE, ORANGE} <= found.keys()


def test_one_step_is_enough():
    assert BLUE in colours(plot_losses(STEPS[:1], {0: 3.5, 1: 3.0}, "a title", "held-out"))
    assert BLUE in colours(plot_learning_rates(STEPS[:1], "a title"))


def test_the_plot_of_learning_rates_has_gradient_norms_too():
    found = colours(plot_learning_rates(STEPS, "a title"))
    greys = sum(count for (r, g, b), count in found.items() if r == g == b and 150 < r < 220)
    assert found[BLUE] > 100
    assert greys > 100


def steps(count):
    return [Step(n, 1, 2.0, 1e-4, 1.0, 40, 200.0, 0.2 * n, None) for n in range(1, count + 1)]


@pytest.mark.parametrize("count", [1, 11, 12, 13, 1000])
def test_the_first_and_the_last_loss_are_written_out_and_not_too_many(count):
    points = [(number, 2.0) for number in range(count)]
    shown = report._spread(points)
    assert (shown[0], shown[-1]) == (points[0], points[-1])
    assert list(shown) == sorted(set(shown))
    assert len(shown) == min(count, report.MOST_NUMBERS)


def test_an_evaluation_after_every_step_of_a_long_run_takes_no_time():
    run = steps(5000)
    colours(plot_losses(run[:1], {0: 2.0}, "a title", "held-out"))
    begun = time.process_time()
    colours(plot_losses(run, {step.step: 2.0 for step in run}, "a title", "held-out"))
    assert time.process_time() - begun < 10  # with a number at each, it is a minute


def test_a_run_without_records_has_plots():
    assert ORANGE in colours(plot_losses([], {0: 2.0, 5: 1.0}, "a title", "held-out"))
    assert colours(plot_learning_rates([], "a title"))
