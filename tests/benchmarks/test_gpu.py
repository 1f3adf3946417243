"""`python -m benchmarks.gpu`: each part runs on a processor, with tiny sizes; its tables."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch

from benchmarks import gpu, speed
from benchmarks.candidates import BASE
from benchmarks.protocol import COMPILED, Budget
from benchmarks.race import Race, checked_runs, peak_of
from benchmarks.results import read_results
from benchmarks.timers import ClockTimer, EventTimer, timer_of
from docs import demo

CPU = torch.device("cpu")
KEPT = read_results(Path(__file__).parents[2] / "benchmarks/results/gpu.json")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What the command writes of the tables of layers and models."""
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    asked = ["--only", "step", "decoding", "--device", "cpu", "--out", str(path)]
    assert gpu.main(asked) == 0
    return read_results(path)


def test_all_candidates_run_eager_and_compiled(measured):
    names = {*gpu.TIMED, *(name + COMPILED for name in gpu.TIMED)}
    assert measured["failed"] == {}
    assert list(measured["tables"]) == ["step", "decoding"]
    for cases in measured["tables"].values():
        for case in cases:
            assert case["missing"] == {}
            assert set(case["seconds"]) == names
            assert all(
                len(taken) == gpu.TINY.budget.least_rounds for taken in case["seconds"].values()
            )
    (step,) = measured["tables"]["step"]
    assert step["kept_bytes"]["bone"] < step["kept_bytes"]["peft_lora"]
    assert set(step["peak_bytes"]) == names


def test_a_run_becomes_tables(measured):
    shown = speed.tables([{**measured, "tables": {**KEPT["tables"], **measured["tables"]}}])
    assert "| 64 x 96, 16 tokens, " in shown["step"]
    assert "*roofline BAT*" in shown["step"]
    assert "disha LoRA" in shown["decoding_compiled"]
    assert "| model | a tiny Llama |" in shown["finetune"]


def test_a_model_is_measured(monkeypatch):
    monkeypatch.setattr(gpu, "TIMED", (BASE, "bone", "peft_lora"))
    (case,) = gpu.model(CPU, gpu.TINY)
    assert case["missing"] == {}
    assert set(case["seconds"]) == set(case["peak_bytes"])
    assert {"bone" + COMPILED, "peft_lora"} < set(case["seconds"])


def test_the_command_fine_tunes_and_proves_the_file(monkeypatch):
    pair = demo.Pair("def twice(x):\n    return 2 * x", "Return twice the number.")
    # Those of the standard library take seconds to read; test_demo.py reads some.
    monkeypatch.setattr(demo, "docstring_pairs", lambda: [pair] * gpu.TINY.rows)
    (case,) = gpu.finetune(CPU, gpu.TINY)
    assert case["steps"] == 2
    assert case["proof"]["loaded"] == pytest.approx(case["proof"]["trained"], abs=1e-3)
    assert "| steps | 2 |" in speed.finetune([case])


def test_what_fails_is_noted_and_the_rest_goes_on(monkeypatch, tmp_path):
    def broken(device, sizes):
        raise ValueError("no memory\nand more")

    monkeypatch.setitem(gpu.TABLES, "step", broken)
    kept = KEPT["tables"]["decoding"]
    monkeypatch.setitem(gpu.TABLES, "decoding", lambda device, sizes: kept)
    path = tmp_path / "gpu.json"
    words = ["--only", "step", "decoding", "--device", "cpu", "--out", str(path)]
    assert gpu.main(words) == 1
    found = read_results(path)
    assert found["failed"] == {"step": "ValueError: no memory"}
    assert found["tables"] == {"decoding": kept}
    assert "- step failed: ValueError: no memory" in speed.runs([found])


def test_a_candidate_that_fails_leaves_the_others():
    def make(model, called):
        def run():
            if model is broken:
                raise RuntimeError("out of memory")

        return run

    fine, broken = torch.nn.Identity(), torch.nn.Linear(1, 1)
    race = Race(("a", "b"), Budget(0.0), compiled=True, backend="eager")
    runs, failed = checked_runs({"a": fine, "b": broken}, make, race)
    assert set(runs) == {"a", "a" + COMPILED}
    assert failed == dict.fromkeys(("b", "b" + COMPILED), "RuntimeError: out of memory")


def test_a_test_that_fails_makes_the_command_fail(monkeypatch, tmp_path):
    said = "FAILED tests/x.py::test_a - no\n== 1 failed, 5 passed in 3.42s ==\n"
    ended = SimpleNamespace(stdout=said, stderr="", returncode=1)
    monkeypatch.setattr(gpu.subprocess, "run", lambda *given, **named: ended)
    path = tmp_path / "gpu.json"
    assert gpu.main(["--only", "tests", "--device", "cpu", "--out", str(path)]) == 1
    found = read_results(path)
    assert found["failed"] == {"tests": "RuntimeError: pytest ended with the code 1"}
    shown = speed.tests(found["tables"]["tests"])
    assert "| `pytest -m cuda` | 1 failed, 5 passed in 3.42s |" in shown
    assert "FAILED tests/x.py::test_a - no" in shown


def test_the_cases_before_one_that_fails_are_kept(monkeypatch, tmp_path):
    def stops(device, sizes):
        yield KEPT["tables"]["step"][0]
        raise RuntimeError("out of memory")

    monkeypatch.setitem(gpu.TABLES, "step", stops)
    path = tmp_path / "gpu.json"
    assert gpu.main(["--only", "step", "--device", "cpu", "--out", str(path)]) == 1
    found = read_results(path)
    assert found["tables"]["step"] == KEPT["tables"]["step"][:1]
    assert found["failed"] == {"step": "RuntimeError: out of memory"}


def test_a_card_is_chosen_by_the_variable_of_cuda(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cuda:1"])
    assert "set CUDA_VISIBLE_DEVICES" in capsys.readouterr().err


class Event:
    """Stands for an event of CUDA: notes when it is recorded."""

    log: list[str] = []  # noqa: RUF012

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.log.append("event")

    def synchronize(self):
        self.log.append("wait")

    def elapsed_time(self, other):
        return 3000.0  # in milliseconds


def test_events_of_cuda_take_the_time_between_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: Event.log.append("idle"))
    timer = EventTimer(CPU, times=2)
    Event.log.clear()
    assert timer.seconds(lambda: Event.log.append("run")) == 1.5
    assert Event.log == ["idle", "event", "run", "run", "event", "wait"]


def test_a_card_is_named(monkeypatch):
    """Simulated, with the names that torch gives the properties of a card."""
    card = SimpleNamespace(
        name="Some GPU", total_memory=80 * 2**30, multi_processor_count=132, major=9, minor=0
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    found = gpu.about(torch.device("cuda"))
    assert (found["name"], found["capability"]) == ("Some GPU", "9.0")
    assert (found["memory_bytes"], found["multiprocessors"]) == (80 * 2**30, 132)


def test_the_peak_of_a_card_is_the_allocators(monkeypatch):
    """Simulated, with the signatures of torch's functions."""
    log = []
    for name, result in (
        ("synchronize", None),
        ("reset_peak_memory_stats", None),
        ("memory_allocated", 100),
        ("max_memory_allocated", 164),
    ):
        stand_in = create_autospec(getattr(torch.cuda, name))
        stand_in.side_effect = partial(note, log, name, result)
        monkeypatch.setattr(torch.cuda, name, stand_in)
    assert peak_of(lambda: log.append("run"), torch.device("cuda")) == 64
    assert log == ["synchronize", "reset_peak_memory_stats", "memory_allocated", "run",
                   "synchronize", "max_memory_allocated"]  # fmt: skip
    assert peak_of(log.clear, torch.device("mps")) is None


def note(log, name, result, *_):
    log.append(name)
    return result


def test_a_device_without_events_has_a_clock():
    assert isinstance(timer_of(CPU), ClockTimer)
    ticks = iter([1.0, 7.0])
    timer = ClockTimer(lambda: next(ticks), wait=lambda: None, times=3)
    assert timer.seconds(lambda: None) == 2.0
