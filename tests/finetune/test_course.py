"""Training that stops, goes on, and comes to the same end."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time

import pytest

from disha.cli import main
from disha.finetune.stopping import SIGNALS
from tests.finetune import tiny_checkpoints
from tests.finetune.command_line import (
    FILES,
    ROWS,
    adapter_of,
    arguments,
    interrupted_after,
    killed_after,
    metrics_of,
    report_of,
    result_of,
    timeless,
    write_rows,
)
from tests.finetune.signalled import begun

STEPS = 12
SAVING = {
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 2,
    "adapter_dropout": 0.2,
    "eval_fraction": 0.2,
    "eval_steps": 5,
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny_path):
    """Flags, rows, and the result of a run that nothing stops."""
    folder = tmp_path_factory.mktemp("straight")
    data = write_rows(folder / "rows.jsonl")
    assert main(arguments(tiny_path, data, folder / "out", **SAVING)) == 0
    return folder / "out"


def checkpoints_in(output):
    return sorted(path.name for path in output.glob("*checkpoint-*"))


# --- one break, in this process -------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 4, 6, 11])
def test_killed_and_resumed_a_run_comes_to_the_same_end(finetune, straight, step):
    killed_after(step, lambda: finetune(**SAVING))
    report = finetune.good("--resume", **SAVING)
    assert result_of(finetune.output) == result_of(straight)
    # Killed before the checkpoint of its step was saved.
    last = (step - 1) // 3 * 3
    expected = str(finetune.output / f"checkpoint-{last}") if last else None
    assert report["training"]["resumed_from"] == expected
    assert report["training"]["steps"] == STEPS
    assert checkpoints_in(finetune.output) == ["checkpoint-12", "checkpoint-9"]


def test_killed_between_saving_and_removing_a_run_leaves_no_checkpoint_too_many(finetune, straight):
    shutil.copytree(straight, finetune.output)
    shutil.copytree(straight / "checkpoint-9", finetune.output / "checkpoint-6")
    (finetune.output / "adapter.safetensors").unlink()
    finetune.good("--resume", **SAVING)
    assert result_of(finetune.output) == result_of(straight)
    assert checkpoints_in(finetune.output) == ["checkpoint-12", "checkpoint-9"]


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": True},
        {"streaming": True, "dataloader_num_workers": 1},
        {"init_weights": "bat", "also_train": "norm", "bits": "bf16"},
        {"gradient_accumulation_steps": 3, "save_strategy": "epoch", "lr_scheduler_type": "linear"},
        {"gradient_checkpointing": True, "bf16": True},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_so_it_does_whatever_the_way_of_training(finetune, tmp_path, changes):
    changes = {**SAVING, "max_steps": 7, "save_steps": 2, **changes}
    finetune.good(output_dir=tmp_path / "straight", **changes)
    killed_after(5, lambda: finetune(**changes))
    report = finetune.good("--resume", **changes)
    assert report["training"]["resumed_from"] is not None
    assert result_of(finetune.output) == result_of(tmp_path / "straight")


@pytest.mark.parametrize("number", SIGNALS)
def test_interrupted_a_run_leaves_a_checkpoint_to_go_on_from(finetune, straight, number):
    done = interrupted_after(4, lambda: finetune(**SAVING), number)
    assert done.code == 128 + number
    checkpoint = finetune.output / "checkpoint-4"
    assert done.err.splitlines()[1:] == [
        "saving a checkpoint; press Ctrl-C again to stop at once",
        f"disha: interrupted after step 4; {checkpoint} is complete: the same command with "
        "--resume goes on from there",
    ]
    assert [line["step"] for line in metrics_of(finetune.output)] == [0, 1, 2, 3, 4]
    report = finetune.good("--resume", **SAVING)
    assert report["training"]["resumed_from"] == str(checkpoint)
    assert result_of(finetune.output) == result_of(straight)


def test_a_chat_template_that_writes_the_date_goes_on_on_another_day(
    finetune, tmp_path, monkeypatch
):
    folder = tiny_checkpoints.write_folder(tmp_path / "model", "llama3")
    (folder / "chat_template.jinja").write_text(
        "{{ strftime_now('%d %b %Y') }}{% for message in messages %}"
        "{{ message['role'] }}: {{ message['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    roles = {"query": "user", "response": "assistant"}
    chats = [
        {"messages": [{"role": role, "content": row[name]} for name, role in roles.items()]}
        for row in ROWS
    ]
    changes = {"base_model_name_or_path": folder, "dataset_field": "messages", "max_steps": 4}
    changes["data_path"] = write_rows(tmp_path / "chats.jsonl", chats)
    assert interrupted_after(2, lambda: finetune(**changes)).code == 130
    later = time.time() + 3 * 86400
    monkeypatch.setattr(time, "time", lambda: later)
    report = finetune.good("--resume", "--verify", **changes)
    assert report["training"]["resumed_from"] is not None
    assert report["verification"]["agrees"]


class Gone(io.StringIO):
    """Standard output or error of a closed terminal, or a pipe whose reader has ended."""

    def __init__(self, code):
        super().__init__()
        self.code, self.nowhere = code, open(os.devnull, "w")  # noqa: SIM115

    def write(self, text):
        raise OSError(self.code, os.strerror(self.code))

    def fileno(self):
        return self.nowhere.fileno()


@pytest.mark.parametrize("code", [errno.EIO, errno.EPIPE])
def test_a_closed_terminal_stops_no_run_and_loses_no_step(
    tmp_path, finetune, straight, monkeypatch, code
):
    """`tee` ends at Ctrl-C too, and a closed terminal sends SIGHUP."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Gone(code))
    words = arguments(finetune.model, finetune.data, finetune.output, **SAVING)
    assert interrupted_after(4, lambda: main(words), signal.SIGHUP) == 128 + signal.SIGHUP
    assert checkpoints_in(finetune.output) == ["checkpoint-3", "checkpoint-4"]
    assert main([*words, "--resume"]) == 0
    assert result_of(finetune.output) == result_of(straight)


def test_evaluations_at_their_steps_and_after_the_last(straight):
    measured = [line["step"] for line in metrics_of(straight) if "eval_loss" in line]
    assert measured == [0, 5, 10, 12]


def test_a_run_without_checkpoints_saves_one_when_it_is_interrupted(finetune, straight):
    changes = {**SAVING, "save_strategy": "no"}
    done = interrupted_after(4, lambda: finetune(**changes))
    assert done.code == 130
    assert checkpoints_in(finetune.output) == ["checkpoint-4"]
    finetune.good("--resume", **changes)
    assert adapter_of(finetune.output) == adapter_of(straight)


def test_asked_to_stop_in_the_last_step_a_run_ends_as_usual(finetune, straight):
    done = interrupted_after(STEPS, lambda: finetune(**SAVING))
    assert done.code == 0
    assert result_of(finetune.output) == result_of(straight)


def test_a_damaged_checkpoint_is_passed_over(finetune, straight):
    killed_after(11, lambda: finetune(**SAVING))
    damaged = finetune.output / "checkpoint-9" / "training.pt"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    done = finetune("--resume", **SAVING)
    assert done.code == 0, done.err
    assert f"{damaged.parent} is skipped: training.pt is damaged" in done.out
    assert f"resuming from {finetune.output / 'checkpoint-6'}, after step 6" in done.out
    assert result_of(finetune.output) == result_of(straight)


def test_where_every_checkpoint_is_damaged_a_run_does_not_begin(finetune):
    killed_after(4, lambda: finetune(**SAVING))
    (finetune.output / "checkpoint-3" / "manifest.json").write_text("{")
    done = finetune("--resume", **SAVING)
    assert done.code == 2
    assert f"every checkpoint in {finetune.output} is damaged" in done.complaint


def test_without_checkpoints_a_run_begins_at_the_beginning(finetune, straight):
    done = finetune("--resume", **SAVING)
    assert done.code == 0, done.err
    assert "no checkpoint to resume from; starting at the beginning" in done.out
    assert result_of(finetune.output) == result_of(straight)


def test_where_checkpoints_lie_a_run_does_not_begin_unasked(finetune, straight):
    killed_after(4, lambda: finetune(**SAVING))
    before = {path: path.read_bytes() for path in finetune.output.rglob("*") if path.is_file()}
    done = finetune(**SAVING)
    assert done.code == 2
    assert "holds checkpoint-3 of an earlier run; continue it with --resume" in done.complaint
    after = {path: path.read_bytes() for path in finetune.output.rglob("*") if path.is_file()}
    assert after == before
    finetune.good("--overwrite_output_dir", **{**SAVING, "save_strategy": "no"})
    assert checkpoints_in(finetune.output) == []
    assert adapter_of(finetune.output) == adapter_of(straight)


# --- what was written before ---------------------------------------------------------------------


def test_resuming_what_has_ended_writes_the_same_again(finetune, straight):
    finetune.good(**SAVING)
    for name in FILES - {"metrics.jsonl"}:
        (finetune.output / name).unlink()
    report = finetune.good("--resume", **SAVING)
    assert report["training"]["steps"] == STEPS
    assert result_of(finetune.output) == result_of(straight)
    assert {path.name for path in finetune.output.iterdir()} >= FILES


@pytest.mark.parametrize("content", [None, "", "{}\n3\n", '{"step": 1, "loss": 2.0}\n'])
def test_metrics_that_are_lost_are_no_reason_not_to_go_on(finetune, straight, content):
    """Nothing of the training depends on them."""
    finetune.good(**SAVING)
    metrics = finetune.output / "metrics.jsonl"
    metrics.unlink()
    if content is not None:
        metrics.write_text(content)
    report = finetune.good("--resume", **SAVING)
    assert report["training"]["steps"] == STEPS
    assert report["training"]["seconds"] > 0
    assert adapter_of(finetune.output) == adapter_of(straight)
    assert report["loss"] == report_of(straight)["loss"]


def test_metrics_have_every_step_once(finetune, straight):
    killed_after(5, lambda: finetune(**SAVING))
    with (finetune.output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    killed_after(8, lambda: finetune("--resume", **SAVING))
    finetune.good("--resume", **SAVING)
    lines = metrics_of(finetune.output)
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert timeless(lines) == timeless(metrics_of(straight))


# --- processes of their own -----------------------------------------------------------------------

KILLS = 5


def lines_of(output):
    metrics = output / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def wait_for(process, condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.is_alive()
        assert time.monotonic() < deadline, "training did not start"
        time.sleep(0.005)


def test_a_process_killed_at_random_moments_comes_to_the_same_end(tmp_path, tiny_path):
    data = write_rows(tmp_path / "rows.jsonl")
    changes = {**SAVING, "max_steps": 60, "save_steps": 1, "eval_steps": 20}
    straight, output = tmp_path / "straight", tmp_path / "out"
    assert main(arguments(tiny_path, data, straight, **changes)) == 0
    words = [*arguments(tiny_path, data, output, **changes), "--resume"]
    moments = random.Random(0)
    for kill in range(KILLS):
        process = begun(words, tmp_path / "log")
        wait_for(process, lambda least=4 * kill: lines_of(output) > least + 3)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (output / "adapter.safetensors").exists()
    assert main(words) == 0
    assert report_of(output)["training"]["resumed_from"] is not None
    assert result_of(output) == result_of(straight)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_gives_its_exit_code_and_leaves_nothing_half_written(tmp_path, tiny_path, number):
    data, output = write_rows(tmp_path / "rows.jsonl"), tmp_path / "out"
    words = arguments(tiny_path, data, output, max_steps=100_000)
    process = begun(words, tmp_path / "log", number)
    try:
        wait_for(process, lambda: lines_of(output) > 3)
        os.kill(process.pid, number)
        process.join(60)
    finally:
        process.kill()
    assert process.exitcode == 128 + number
    said = (tmp_path / "log" / "err").read_text()
    [told] = [line for line in said.splitlines() if line.startswith("disha")]
    assert told.startswith("disha: interrupted after step ")
    assert "Traceback" not in said
    [checkpoint] = checkpoints_in(output)
    assert checkpoint in told
    assert {path.name for path in output.iterdir()} == {"metrics.jsonl", checkpoint}
    last = int(checkpoint.removeprefix("checkpoint-"))
    assert [line["step"] for line in metrics_of(output)] == list(range(last + 1))
    manifest = json.loads((output / checkpoint / "manifest.json").read_text())
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((output / checkpoint / name).read_bytes()).hexdigest() == digest
