"""What the command shows: in a log, on a terminal, and for `--help`."""

import ast
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from disha import ArgumentError
from disha.cli import main as disha_command
from tests.finetune.tiny_models import write_rows
from tests.processes import environment

HELP_THEN_RUN = """
import sys
from contextlib import suppress
from disha.cli import main

for name in ("generate", "evaluate", "finetune"):
    with suppress(SystemExit):
        main([name, "--help"])
print("trainers:", {"transformers.trainer", "trl.trainer.sft_trainer"} & set(sys.modules))
sys.exit(main(sys.argv[1:]))
"""
"""One process for both, because most of its time is that of imports."""


def variables():
    """Return those of a process that this one has not told whether to show bars."""
    return {key: value for key, value in environment().items() if not key.startswith("TQDM")}


def words_of(tiny, data, folder, *more):
    words = ["finetune", "--base", tiny, "--data", data, "--r", 8, "--output_dir", folder, *more]
    return list(map(str, words))


def on_a_terminal(words):
    """Return what the command writes to a terminal of 100 columns."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    command = [sys.executable, "-m", "disha", *words]
    process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=variables())
    os.close(its)
    written = b""
    try:
        while part := os.read(ours, 65536):
            written += part
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(ours)
    assert process.wait() == 0, written
    return written.decode()


def screen(written):
    """Return the lines that stay: a carriage return lets the line be written over."""
    lines = []
    for line in written.replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def losses_of(lines):
    """Return what is shown of each step with a loss."""
    return [ast.literal_eval(line) for line in lines if line.startswith("{")]


@pytest.fixture(scope="module")
def helps_and_log(tiny, data, tmp_path_factory):
    """What is printed for `--help`, and what a run then prints that writes to no terminal."""
    folder = tmp_path_factory.mktemp("log") / "out"
    words = words_of(tiny, data, folder, "--max_steps", 2, "--logging_steps", 1)
    command = [sys.executable, "-c", HELP_THEN_RUN, *words]
    done = subprocess.run(command, env=variables(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    helps, _, log = done.stdout.partition("trainers: set()\n")
    return helps, log


def test_help_is_help_alone(helps_and_log):
    """It comes before trainers are imported."""
    helps, log = helps_and_log
    assert re.findall("^usage: disha (.*?) ", helps, re.MULTILINE) == [
        "generate",
        "evaluate",
        "finetune",
    ]
    assert log


def test_a_log_is_short_and_plain(helps_and_log):
    _, log = helps_and_log
    lines = log.splitlines()
    assert 0 < len(lines) <= 30
    assert all(line and line.isprintable() for line in lines)
    shown = losses_of(lines)
    course = ["of", "elapsed", "left"]
    assert list(shown[0]) == ["step", "eval_loss", *course]
    assert list(shown[1]) == ["step", "loss", "learning_rate", *course]
    assert [losses["of"] for losses in shown] == [2] * len(shown)
    assert (shown[0]["left"], shown[-1]["left"]) == ("?", "00:00")
    assert all(re.fullmatch(r"\d\d:\d\d", losses["elapsed"]) for losses in shown)
    assert {losses["step"] for losses in shown} == {0, 1, 2}


def test_a_terminal_has_one_bar(tiny, data, tmp_path):
    more = ["--eval_fraction", 0.25, "--eval_strategy", "steps", "--eval_steps", 2]
    words = words_of(tiny, data, tmp_path / "out", "--max_steps", 4, "--logging_steps", 2, *more)
    written = on_a_terminal(words)
    assert "\x1b" not in written  # a second bar moves the cursor
    assert "it/s" in written
    lines = screen(written)
    assert not any("it/s" in line for line in lines)
    assert {losses["step"] for losses in losses_of(lines)} == {0, 2, 4}
    assert not any("left" in losses for losses in losses_of(lines))  # the bar has it


@pytest.mark.parametrize("packing", [[], ["--packing"]])
def test_rows_that_are_cut_or_left_out_are_counted(finetune, tiny, tmp_path, capsys, packing):
    rows = [{"query": "q", "response": "a" * n} for n in (2, 2, 40)]
    path = write_rows(tmp_path / "rows.jsonl", [*rows, {"query": "q" * 40, "response": "a"}])
    told = (
        "of 4 rows, 2 cut to 10 tokens, and 1 left out, because nothing to learn is in what is left"
    )
    words = ["--max_length", "10", "--data", str(path)]
    finetune(tmp_path / "out", *words, *packing)
    assert capsys.readouterr().err.count(told) == 2  # to train on, and to measure on
    exact = ["--exact_match", "--max_new_tokens", "1"]
    assert disha_command(["evaluate", "--base", str(tiny), *words, *exact, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["base"]["rows"] == 3  # those that were measured and asked
    assert err.count(told) == 1
    for limit in (0, 1):
        with pytest.raises(ArgumentError, match=f"none of the train rows has .* in {limit} tokens"):
            finetune(tmp_path / "none", *words, "--max_length", limit)
    held_out = write_rows(tmp_path / "held_out.jsonl", [{"query": "q" * 40, "response": "a"}])
    with pytest.raises(ArgumentError, match="none of the eval rows has something to learn in 10"):
        finetune(tmp_path / "none", *words, "--eval_data", held_out)
