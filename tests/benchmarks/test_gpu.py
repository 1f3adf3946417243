"""`python -m benchmarks.gpu`: each part runs on a processor, with tiny sizes; the page of a run."""

import copy
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_page
from benchmarks.candidates import BASE
from benchmarks.compiled import COMPILED
from benchmarks.results import read_results
from benchmarks.timers import ClockTimer, EventTimer, timer_of

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")
KEPT = read_results(ROOT / "benchmarks/results/gpu.json")


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


def test_a_run_becomes_a_page(measured):
    page = gpu_page.page({**measured, "tables": {**KEPT["tables"], **measured["tables"]}})
    for words in (
        "64 x 96, 16 tokens",
        "*roofline bat*",
        "Compiled:",
        "Fine-tuning",
        "a tiny Llama",
    ):
        assert words in page


def test_a_model_is_measured(monkeypatch):
    monkeypatch.setattr(gpu, "TIMED", (BASE, "bone", "peft_lora"))
    (case,) = gpu.model(CPU, gpu.TINY)
    assert case["missing"] == {}
    assert set(case["seconds"]) == set(case["peak_bytes"])
    assert {"bone" + COMPILED, "peft_lora"} < set(case["seconds"])


def test_the_command_fine_tunes_and_proves_the_file():
    (case,) = gpu.finetune(CPU, gpu.TINY)
    assert case["steps"] == 2
    assert case["proof"]["loaded"] == pytest.approx(case["proof"]["trained"], abs=1e-3)
    assert "2 steps in" in gpu_page.finetune([case])


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
    assert "- step: ValueError: no memory" in gpu_page.page(found)


def test_a_candidate_that_fails_leaves_the_others():
    def make(model, called):
        def run():
            if model is broken:
                raise RuntimeError("out of memory")

        return run

    fine, broken = torch.nn.Identity(), torch.nn.Linear(1, 1)
    runs, failed = gpu.eager_and_compiled({"a": fine, "b": broken}, make, CPU)
    assert set(runs) == {"a", "a" + COMPILED}
    assert failed == dict.fromkeys(("b", "b" + COMPILED), "RuntimeError: out of memory")


def test_tests_are_counted_by_how_they_end():
    found = gpu.counted_tests("...s.F\nsome text\n== 1 failed, 5 passed, 1 skipped in 3.42s ==\n")
    assert found == {"passed": 5, "failed": 1, "error": 0, "skipped": 1,
                     "said": "1 failed, 5 passed, 1 skipped in 3.42s"}  # fmt: skip


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


def test_a_device_without_events_has_a_clock():
    assert isinstance(timer_of(CPU), ClockTimer)
    ticks = iter([1.0, 7.0])
    timer = ClockTimer(lambda: next(ticks), wait=lambda: None, times=3)
    assert timer.seconds(lambda: None) == 2.0


def test_page_and_readme_are_what_the_kept_run_gives():
    for path, text in ((gpu_page.PAGE, gpu_page.page), (gpu_page.README, gpu_page.readme)):
        shown = (ROOT / path).read_text(encoding="utf-8")
        assert gpu_page.with_text(shown, text(KEPT), *gpu_page.MARKS[path]) == shown


def test_a_run_on_a_processor_is_called_so():
    assert "Measured on a *processor*" in gpu_page.page(KEPT)
    assert gpu_page.readme(KEPT).startswith("**No GPU has run this yet**")


def test_a_run_on_a_gpu_gives_readme_a_table():
    run = copy.deepcopy(KEPT)
    run |= {"device": "Some GPU", "accelerator": {"name": "Some GPU"}}
    seconds = run["tables"]["step"][0]["seconds"]
    seconds["bone"] = [taken / 2 for taken in seconds["peft_lora"]]
    del seconds["loralib"]
    shown = gpu_page.readme(run)
    assert "one has run. Some GPU, divided by PEFT's LoRA" in shown
    (row,) = (line for line in shown.splitlines() if "of a layer" in line and "eager" in line)
    assert row.split(" | ")[1] == "0.500"
    assert row.rstrip(" |").endswith(" -")
    assert "processor" not in gpu_page.page(run).partition("## The run")[0]
