"""The dispatcher: help, exit codes, errors in one line, and what is imported when."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest

import disha
from disha.cli import COMMANDS
from disha.cli.dispatcher import Command
from disha.errors import AdapterFileWarning
from disha.finetune.errors import SettingsError
from disha.finetune.settings import FIRST, FinetuneSettings
from tests.cli.conftest import Done

MODEL_COMMANDS = ("finetune", "generate", "evaluate")


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


def test_help_of_finetune_names_its_flags(run):
    told = run("finetune", "--help").out
    for flag in FinetuneSettings().to_json():
        assert f"--{flag} " in told
    groups = re.findall(r"^(\S.*):$", told, re.MULTILINE)
    rest = ["model", "adapter", "data", "training", "output", "general"]
    assert groups == ["examples", "most used", *rest]
    first = re.findall(r"^  .*--(\w+)", told.split("most used:")[1].split("\nmodel:")[0], re.M)
    assert first == list(FIRST)
    assert len(FIRST) == 10
    assert max(map(len, told.splitlines())) <= 100


def test_without_a_command_the_help_is_shown(run):
    assert run() == run("--help")


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("finetun", "finetune"),
        ("fine-tune", "finetune"),
        ("train", "finetune"),
        ("chat", "generate"),
        ("eval", "evaluate"),
        ("export", "convert"),
        ("fuse", "merge"),
        ("show", "inspect"),
        ("--nonsense", None),
        ("xyz", None),
    ],
)
def test_an_unknown_command_names_the_one_that_is_meant(run, word, meant):
    done = run(word, "x")
    hint = "" if meant is None else f"did you mean {meant}? "
    assert done.code == 2
    assert done.complaint == f"disha: {word!r} is not a command; {hint}disha --help lists all\n"


def test_of_several_processes_the_first_complains_of_wrong_usage(run, files, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("disha.finetune.stopping.LONGEST_WAIT", 0.0)
    assert run("inspect", files.adapter(), "--stat") == Done(2, "", "")


@pytest.mark.parametrize("name", MODEL_COMMANDS)
def test_a_wrong_value_is_named_with_its_flag(run, name):
    assert "--bits must be one of bf16, fp32, 8, 4, got '7'" in run(name, "--bits", "7").complaint
    flag = "--top_k" if name == "generate" else "--max_seq_length"
    assert f"{flag} must be a whole number, got 'many'" in run(name, flag, "many").complaint


@pytest.mark.parametrize("name", MODEL_COMMANDS)
def test_what_a_model_command_needs_is_named_when_missing(run, name):
    done = run(name)
    assert done.code == 2
    assert "--base_model_name_or_path path/to/model is missing" in done.complaint


# --- exit codes ----------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch):
    """Let a command `it` be what a test gives as its `run`."""

    def install(run, **options):
        module = types.ModuleType("disha.cli.it")
        module.run = run
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(COMMANDS, "it", Command("", **options))

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
    assert run("it").complaint == "disha: these differ: 0: a; 1: b\n"


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


def test_errors_and_warnings_of_the_library_name_flags(run, command):
    def warn_and_fail(arguments):
        warnings.warn_explicit("pass exclude=", UserWarning, disha.__file__, 1)
        raise disha.TargetError("r=8 is too large (`exclude`)")

    command(warn_and_fail, flags={"r": "--bone_r", "exclude": "--exclude"})
    done = run("it")
    first, second = done.err.splitlines()
    assert (done.code, first) == (2, "disha: warning: pass --exclude")
    assert second == "disha: --bone_r 8 is too large (--exclude)"


def test_errors_of_a_command_itself_stay_as_they_are(run, command):
    command(raising(SettingsError("--output r=8 exists")), flags={"r": "--bone_r"})
    assert run("it").complaint == "disha: --output r=8 exists\n"


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


MISSING = """
import sys
sys.modules["torch"] = None  # Python's mark of a module that must not be imported
from disha.cli import COMMANDS, main
base = ["--base", "."]
flags = {
    "finetune": [*base, "--data", ".", "--output", sys.argv[1]],
    "generate": [*base, "--prompt", "a"],
    "evaluate": [*base, "--data", "."],
}
print([main([name, *flags.get(name, [])]) for name in COMMANDS])
main(["--help"])
"""


def test_without_the_extra_the_install_line_is_given(tmp_path):
    done = python(MISSING, tmp_path)
    lines = dict(zip(COMMANDS, done.stderr.splitlines(), strict=True))
    assert done.stdout.startswith(f"{[2] * len(COMMANDS)}")
    for name, line in lines.items():
        extra = "finetune" if name in MODEL_COMMANDS else "cli"
        assert "needs the package torch, which is not installed" in line
        assert f'pip install "disha-torch[{extra}]"' in line


WITHOUT = """
import sys
sys.modules[sys.argv[1]] = None
from disha.cli import main
sys.exit(main(["finetune", "--demo", "--max_steps", "1", "--output_dir", sys.argv[2]]))
"""


@pytest.mark.parametrize("package", ["matplotlib", "tqdm"])
def test_a_package_that_a_run_needs_later_is_missed_at_its_beginning(tmp_path, package):
    done = python(WITHOUT, package, tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"needs the package {package}" in done.stderr
    assert 'pip install "disha-torch[finetune]"' in done.stderr


def test_what_only_one_command_needs_is_imported_when_it_runs(files):
    code = (
        "import json, sys, disha\n"
        "disha.inject_adapters\n"
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
        "disha.cli.inspect",
        "disha.cli.output",
        "disha.files.statistics",
    }
    others = {name.partition(".")[0] for name in running}
    assert not others & {"gguf", "matplotlib", "numpy", "tokenizers", "peft", "transformers"}


HELPFUL = """
import json, sys
from disha.cli import main
codes = [main(words.split()) for words in json.loads(sys.argv[1])]
print(json.dumps([codes, [name for name in ("torch", "rich", "yaml") if name in sys.modules]]))
"""


def test_help_and_complaints_about_flags_come_without_torch():
    """Torch takes more than a second to import, and these take less than a tenth of it."""
    good = ["", "--help", "--version", "finetune --help", "generate --help"]
    good += ["evaluate --help"]
    bad = [
        "trian",
        "finetune --rank 8",
        "finetune --bone_r many",
        "finetune",
        "finetune --lr 0",
        "generate",
    ]
    done = python(HELPFUL, json.dumps([*good, *bad]))
    codes, imported = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0] * len(good) + [2] * len(bad)
    assert imported == []
    assert len(done.stderr.splitlines()) == len(bad)


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
