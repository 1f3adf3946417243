"""Signals at any moment of a run: the exit code, what is kept, and the result after resuming."""

from __future__ import annotations

import signal
import threading
from itertools import cycle

import pytest

from disha.cli import main
from disha.finetune.stopping import SIGNALS, Interrupted, listening, noted_signal, raising
from tests.finetune.command_line import arguments, result_of, write_rows
from tests.finetune.signalled import run, stop_often

FLAGS = {
    "max_steps": 6,
    "eval_steps": 2,
    "eval_fraction": 0.2,
    "gradient_accumulation_steps": 2,
    "adapter_dropout": 0.2,
    "save_strategy": "steps",
    "save_steps": 4,
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny_path):
    """The rows, and the result of a run that nothing stops."""
    folder = tmp_path_factory.mktemp("straight")
    data = write_rows(folder / "rows.jsonl")
    assert main(arguments(tiny_path, data, folder / "out", **FLAGS)) == 0
    return data, result_of(folder / "out")


# --- each phase of a run --------------------------------------------------------------------------

LAYER = ("disha.finetune.models.decoder", "DecoderLayer.forward")
NOTHING_LOST = "disha: interrupted; every file that was written is complete"
NOT_BEGUN = "disha: interrupted before the end of the first step; run the same command again"
ADAPTER_COMPLETE = "disha: interrupted after training; the adapter is complete in "

PHASES = {
    "reading rows": (("disha.finetune.data.encoding", "Encoder.outcome", 5), NOTHING_LOST),
    "reading the model": (
        ("disha.finetune.models.gguf", "GGUFCheckpoint.load_model", 1),
        NOTHING_LOST,
    ),
    "the first evaluation": ((*LAYER, 2), NOT_BEGUN),
    # From here on, each run resumes from the checkpoint of the one before. An evaluation and a
    # batch have two calls of a layer, and a step has two batches.
    "the second batch of a step": ((*LAYER, 2 + 4 + 3), 1),
    "the backward of a step": (("torch", "Tensor.backward", 2), 1),
    # The first call is on resuming, where the optimizer gets its state.
    "updating the weights": (("torch.optim", "AdamW.step", 2), 2),
    "an evaluation": ((*LAYER, 1), 2),
    "recording a step": (("disha.finetune.metrics", "Metrics.record_step", 2), 3),
    "saving a checkpoint": (("disha.finetune.training.checkpoints", "_complete", 1), 4),
    "the last evaluation": ((*LAYER, 4 + 4 + 2), 6),
    "writing the adapter": (("disha", "save_adapter", 1), ADAPTER_COMPLETE),
    "sampling": (("disha.finetune.answering", "Answerer.answer", 1), ADAPTER_COMPLETE),
}
"""Phases: where the signal comes, and what is said, or the step of the checkpoint."""


def test_stopped_in_every_phase_a_run_comes_to_the_same_end(tmp_path, tiny_path, straight):
    data, expected = straight
    output = tmp_path / "out"
    words = [*arguments(tiny_path, data, output, **FLAGS), "--resume"]
    for (phase, (place, left)), number in zip(PHASES.items(), cycle(SIGNALS), strict=False):
        done = run(words, tmp_path / "log", number, [place])
        assert done.code == 128 + number, (phase, done)
        told = done.err.splitlines()[-1]
        if isinstance(left, int):
            checkpoint = output / f"checkpoint-{left}"
            assert told.startswith(f"disha: interrupted after step {left}; {checkpoint} "), phase
            assert checkpoint.exists(), phase
        else:
            assert told.startswith(left), phase
            assert (output / "adapter.safetensors").exists() == (left == ADAPTER_COMPLETE), phase
        assert not list(output.glob(".*")), phase
    done = run(words, tmp_path / "log", 0)
    assert done.code == 0, done.err
    assert result_of(output) == expected


def test_stopped_at_any_call_in_training_a_run_comes_to_the_same_end(tmp_path, tiny_path, straight):
    data, expected = straight
    words = [*arguments(tiny_path, data, tmp_path / "out", **FLAGS), "--resume"]
    assert stop_often(words, tmp_path / "log", seed=0, calls=(1_000, 9_000)) > 1
    assert result_of(tmp_path / "out") == expected


# --- more than one signal, and none ---------------------------------------------------------------

SAVING = ("disha.finetune.training.checkpoints", "_complete", 1)
IN_STEP_2 = ((*LAYER, 2 + 4 + 2), SAVING)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once(tmp_path, tiny_path, straight, number):
    data, expected = straight
    output = tmp_path / "out"
    words = [*arguments(tiny_path, data, output, **FLAGS), "--resume"]
    done = run(words, tmp_path / "log", number, IN_STEP_2)
    assert done.code == 128 + number
    assert done.err.splitlines()[1:] == [
        "saving a checkpoint; press Ctrl-C again to stop at once",
        "",
        "disha: stopped at once; every file that was written is complete",
    ]
    assert not list(output.glob("checkpoint-*"))
    done = run(words, tmp_path / "log", 0)
    assert result_of(output) == expected
    assert not list(output.glob(".*"))


def test_what_ends_worker_processes_too_is_no_failure(tmp_path, tiny_path, straight):
    data, _ = straight
    words = arguments(tiny_path, data, tmp_path / "out", **FLAGS, dataloader_num_workers=1)
    place = ("disha.finetune.data.encoding", "Tally.add", 5)
    done = run(words, tmp_path / "log", signal.SIGTERM, [place], to_group=True)
    assert done.code == 128 + signal.SIGTERM, done.err
    assert done.err.splitlines()[-1] == NOTHING_LOST


def test_under_nohup_a_closed_terminal_stops_nothing(tmp_path, tiny_path, straight):
    data, expected = straight
    words = arguments(tiny_path, data, tmp_path / "out", **FLAGS)
    ignoring = {signal.SIGHUP: signal.SIG_IGN}
    done = run(words, tmp_path / "log", signal.SIGHUP, [(*LAYER, 8)], before=ignoring)
    assert done.code == 0, done.err
    assert result_of(tmp_path / "out") == expected


# --- in this process ------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _usual_handlers():
    """As in a terminal, whatever started these tests."""
    usual = dict.fromkeys(SIGNALS, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_raises_unless_it_is_held(number):
    with listening(), raising(False):
        assert noted_signal() is None
        signal.raise_signal(number)
        assert noted_signal() == number
        signal.raise_signal(number)  # the same, sent on by torchrun
        with pytest.raises(Interrupted) as raised, raising(True):
            pytest.fail("a signal that was noted raises at once")
        assert raised.value.number == number
    with listening():
        assert noted_signal() is None
        with pytest.raises(Interrupted):
            signal.raise_signal(number)


def test_signals_mean_afterwards_what_they_meant_before():
    before = list(map(signal.getsignal, SIGNALS))
    with pytest.raises(ZeroDivisionError), listening():
        raise ZeroDivisionError
    with pytest.raises(Interrupted), listening():
        signal.raise_signal(signal.SIGTERM)
    assert list(map(signal.getsignal, SIGNALS)) == before


def test_what_a_program_does_at_a_signal_stays_its_own():
    got = []
    signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))
    with listening():
        signal.raise_signal(signal.SIGUSR1)
    assert got == [signal.SIGUSR1]


def test_in_another_thread_nothing_changes_and_nothing_fails():
    found = []

    def listen():
        with listening():
            found.extend(map(signal.getsignal, SIGNALS))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == list(map(signal.getsignal, SIGNALS))
