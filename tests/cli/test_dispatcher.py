"""The dispatcher: help, exit codes, errors in one line, and what is imported when."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest

import disha
from disha.cli import COMMANDS, dispatcher
from disha.cli.dispatcher import Command
from disha.files import AdapterFileWarning
from disha.finetune.settings import FinetuneSettings

MODEL_COMMANDS = ("finetune", "generate", "evaluate")
DISTRIBUTIONS = {"yaml": "pyyaml"}
"""Of modules, where the name is another."""


def python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True
    )


def test_version(run):
    assert run("--version").out == f"disha {disha.__version__}\n"


def test_help_names_every_command(run):
    told = run("--help")
    assert told.code == 0
    assert all(
        name in told.out and command.summary in told.out for name, command in COMMANDS.items()
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(run, name):
    told = run(name, "--help")
    assert (told.code, told.err) == (0, "")
    assert f"usage: disha {name}" in told.out
    assert "--debug" in told.out
    assert f"examples:\n  disha {name} " in told.out
    assert ("--json" in told.out) == (name != "finetune")
    assert "None" not in told.out


def test_help_of_finetune_names_its_flags(run):
    told = run("finetune", "--help").out
    for flag in FinetuneSettings().to_json():
        assert f"--{flag} " in told
    for group in ("model", "adapter", "data", "training", "output"):
        assert f"{group} options" in told


@pytest.mark.parametrize("given", [[], ["finetun"], ["--nonsense"]])
def test_wrong_usage_is_exit_code_2(run, given):
    done = run(*given)
    assert done.code == 2
    assert "disha: error:" in done.err


def test_wrong_usage_of_a_command_is_one_line_that_names_the_nearest(run, files):
    done = run("inspect", files.adapter(), "--stat")
    assert done.code == 2
    assert "disha inspect: " in done.complaint
    assert "--stat" in done.complaint
    assert "Perhaps you meant: --stats" in done.complaint
    assert not set("╭│─╰") & set(done.err)
    assert "---" not in done.err


@pytest.mark.parametrize("name", MODEL_COMMANDS)
def test_a_wrong_value_is_complained_of_without_the_help_of_the_flag(run, name):
    said = run(name, "--bits", "7").complaint
    assert "invalid choice '7' for argument '--bits'" in said
    said = run(name, "--max_seq_length" if name != "generate" else "--top_k", "many").complaint
    assert "'many'" in said
    assert "Most tokens" not in said
    assert "Choose among" not in said


@pytest.mark.parametrize("name", MODEL_COMMANDS)
def test_what_a_model_command_needs_is_named_when_missing(run, name):
    done = run(name)
    assert done.code == 2
    assert "--base_model_name_or_path path/to/model is missing" in done.complaint


def test_on_a_terminal_wrong_usage_is_shown_in_a_box(run, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    done = run("inspect", "--stat")
    assert done.code == 2
    assert done.err.count("\n") > 3


# --- exit codes ----------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch):
    """Let a command `it` be what a test gives as its `run`."""

    def install(run, **options):
        module = types.ModuleType("a_command_of_this_test")
        module.run = run
        monkeypatch.setitem(sys.modules, module.__name__, module)
        made = Command("", module.__name__, packages=(), **options)
        monkeypatch.setitem(COMMANDS, "it", made)

    return install


def raising(error, cause=None):
    def run(arguments):
        raise error from cause

    return run


FULL = OSError(errno.ENOSPC, "No space left on device")
GONE = FileNotFoundError(errno.ENOENT, "No such file")


@pytest.mark.parametrize(
    ("error", "cause", "code"),
    [
        (disha.ArgumentError("x"), None, 2),
        (disha.ArgumentTypeError("x"), None, 2),
        (disha.AdapterFileError("x"), None, 2),
        (disha.AdapterIOError("it is a folder"), None, 2),
        (disha.AdapterIOError("x"), GONE, 2),
        (GONE, None, 2),
        (PermissionError(errno.EACCES, "x"), None, 2),
        (disha.AdapterIOError("x"), FULL, 1),
        (FULL, None, 1),
        (disha.MergeError("x"), None, 1),
        (KeyboardInterrupt(), None, 130),
    ],
)
def test_exit_code_by_what_went_wrong(run, command, error, cause, code):
    command(raising(error, cause))
    done = run("it")
    assert done.code == code
    assert done.complaint


@pytest.mark.parametrize("error", [FULL, disha.MergeError("x"), disha.ArgumentError("x"), GONE])
def test_of_a_command_that_answers_every_error_is_2(run, command, error):
    command(raising(error), answers=True)
    assert run("it").code == 2


@pytest.mark.parametrize(("answer", "code"), [(None, 0), (0, 0), (1, 1)])
def test_a_command_gives_its_own_exit_code(run, command, answer, code):
    command(lambda arguments: answer)
    assert run("it").code == code


def test_the_arguments_after_a_commands_name_are_its_own(run, command):
    command(lambda arguments: print(arguments))
    assert run("it", "--version", "x").out == "['--version', 'x']\n"


def test_an_error_of_several_lines_becomes_one(run, command):
    command(raising(disha.AdapterFileError("these differ:\n0: a\n1: b")))
    assert run("it").complaint == "disha: these differ:; 0: a; 1: b\n"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("pass rank=, and max_error= to refuse", "pass --rank, and --max-error to refuse"),
        ("or pass overwrite=True", "or pass --overwrite"),
        ("leave them out (also_train=False)", "leave them out (--no-also-train)"),
        ("heads= and kv_heads= of the base", "--heads and --kv-heads of the base"),
        ("r=4 and rank=8 and max_error=0.1", "r=4 and rank=8 and max_error=0.1"),
        ("leave it out (exclude=)", "leave it out (exclude=)"),
    ],
)
def test_errors_name_flags_as_they_are_here(run, command, said, shown):
    command(raising(disha.ArgumentError(said)))
    assert run("it").complaint == f"disha: {shown}\n"


def test_debug_shows_where_an_error_came_from(run, command):
    command(raising(disha.ArgumentError("x")))
    found = run("it", "--debug")
    assert found.code == 2
    assert "Traceback" in found.err
    assert found.err.endswith("disha: x\n")


@pytest.mark.parametrize(("answers", "code"), [(True, 2), (False, 1)])
def test_an_error_that_nobody_expected_is_no_answer(run, command, answers, code):
    command(raising(RuntimeError("x")), answers=answers)
    found = run("it")
    assert found.code == code
    assert "RuntimeError: x" in found.err


def test_warnings_of_the_library_are_one_line_and_others_as_ever(run, command):
    def warn(arguments):
        warnings.warn("the base is another", AdapterFileWarning, stacklevel=1)
        warnings.warn("old", FutureWarning, stacklevel=1)

    command(warn)
    with pytest.warns(FutureWarning, match="old"):
        done = run("it")
    assert (done.code, done.err) == (0, "disha: warning: the base is another\n")


def test_what_no_one_reads_is_no_complaint(files):
    code = "import sys; from disha.cli import main; sys.stdin.read(); sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "inspect", str(files.adapter())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    process.stdin.close()  # now it may print
    assert process.stderr.read() == b""
    assert process.wait() == 2


# --- imports -------------------------------------------------------------------------------------


def test_without_the_extra_the_install_line_is_given(files):
    # None in sys.modules is how Python marks a module that must not be imported.
    code = (
        "import sys\n"
        "for name in ('gguf', 'matplotlib', 'tokenizers', 'tqdm', 'tyro', 'yaml'):\n"
        "    sys.modules[name] = None\n"
        "from disha.cli import main\n"
        "from disha.cli import COMMANDS\n"
        "print([main([name]) for name in COMMANDS])\n"
        "main(['--help'])\n"
    )
    done = python(code)
    lines = dict(zip(COMMANDS, done.stderr.splitlines(), strict=True))
    assert done.stdout.startswith(f"{[2] * len(COMMANDS)}")
    for name, line in lines.items():
        if name in MODEL_COMMANDS:
            assert "needs gguf, matplotlib, tokenizers, tqdm, tyro, yaml, not" in line
            assert 'pip install "disha-torch[finetune]"' in line
        else:
            assert "needs tqdm, tyro, not installed here" in line
            assert 'pip install "disha-torch[cli]"' in line


def test_the_extras_have_what_the_commands_ask_for():
    from importlib.metadata import requires

    by_extra = {}
    for line in requires("disha-torch"):
        name, _, condition = line.partition(";")
        if "extra ==" in condition:
            extra = condition.split("==")[1].strip().strip("\"'")
            by_extra.setdefault(extra, set()).add(name.split(">")[0].strip())
    for command in COMMANDS.values():
        packages = {DISTRIBUTIONS.get(name, name) for name in command.packages}
        assert packages <= by_extra[command.extra], command
    assert by_extra["cli"] <= by_extra["finetune"] <= by_extra["dev"]


def test_what_only_one_command_needs_is_imported_when_it_runs(files):
    code = (
        "import json, sys, disha\n"
        "before = set(sys.modules)\n"
        "from disha.cli import main\n"
        "dispatching = set(sys.modules) - before\n"
        "main(['inspect', sys.argv[1], '--stats'])\n"
        "running = set(sys.modules) - before - dispatching\n"
        "print(json.dumps([sorted(dispatching), sorted(running)]))\n"
    )
    dispatching, running = map(
        set, json.loads(python(code, files.adapter()).stdout.splitlines()[-1])
    )
    assert all(name.startswith("disha.cli") for name in dispatching - set(sys.stdlib_module_names))
    assert {name for name in running if name.startswith("disha")} == {
        "disha.cli.flags",
        "disha.cli.helping",
        "disha.cli.inspect",
        "disha.cli.output",
        "disha.files.statistics",
    }
    others = {name.partition(".")[0] for name in running}
    assert not others & {"gguf", "matplotlib", "numpy", "tokenizers", "peft", "transformers"}


# --- as a program --------------------------------------------------------------------------------


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "disha", "--version"], capture_output=True, text=True
    )
    assert done.stdout == f"disha {disha.__version__}\n"


def test_as_the_installed_script(files):
    script = Path(sys.executable).with_name("disha")
    a, b = files.adapter("a"), files.adapter("b", seed=2)
    root = Path(disha.__file__).parents[1]
    done = subprocess.run(
        [script, "diff", a, b, "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert json.loads(done.stdout)["same"] is False


def test_exit_codes_are_written_down():
    said = dispatcher.__doc__ + sys.modules["disha.cli.exit_codes"].__doc__
    for code in ("| 0 |", "| 1 |", "| 2 |", "| 130 |"):
        assert code in said
