"""The dispatcher: help, exit codes, errors in one line, and what is imported when."""

import errno
import logging
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

import disha
from disha.cli import COMMANDS
from disha.cli.dispatcher import Parser
from disha.errors import AdapterFileWarning
from tests.cli.conftest import Done
from tests.pages import ROOT


def test_version(run):
    assert run("--version").out == f"disha {disha.__version__}\n"


def test_help_names_every_command(run):
    told = run("--help")
    assert told.code == 0
    assert all(name in told.out and summary in told.out for name, summary in COMMANDS.items())
    assert run() == told


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(run, name):
    told = run(name, "--help")
    assert (told.code, told.err) == (0, "")
    assert f"disha {name}" in told.out


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("finetun", "finetune"),
        ("fine-tune", "finetune"),
        ("evaluat", "evaluate"),
        ("generat", "generate"),
        ("xyz", None),
    ],
)
def test_an_unknown_command_names_the_one_that_is_meant(run, word, meant):
    done = run(word, "x")
    hint = "" if meant is None else f" (did you mean {meant}?)"
    assert (done.code, done.complaint) == (2, f"disha: {word!r} is not a command{hint}\n")


@pytest.mark.parametrize("gone", ["diff", "combine", "verify"])
def test_commands_that_are_gone(run, gone):
    assert run(gone, "a", "b").code == 2


def test_of_several_processes_each_names_its_error_and_the_first_warns(run, command, monkeypatch):
    def warn_and_fail(words):
        warnings.warn("the base is another", AdapterFileWarning, stacklevel=1)
        raise disha.AdapterIOError("no space left")

    command(warn_and_fail)
    warning = "disha: warning: the base is another\n"
    assert run("it") == Done(2, "", f"{warning}disha: no space left\n")
    monkeypatch.setenv("RANK", "1")
    assert run("it") == Done(2, "", "disha, rank 1: no space left\n")


# --- flags ---------------------------------------------------------------------------------------


def parser():
    made = Parser("it", "About it.")
    made.add_argument("--max_error", type=float)
    made.add_argument("--overwrite", action="store_true")
    return made


def test_flags_may_have_dashes_or_underscores():
    assert parser().parse(["--max-error", "0.5"]).max_error == 0.5
    assert parser().parse(["--max-error=-1e-3"]).max_error == -1e-3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--max_eror", "1"], "disha it does not take --max_eror (did you mean --max_error?)"),
        (["--abc", "1", "--xyz"], "disha it does not take --abc, --xyz"),
        (["--overwite=1"], "did you mean --overwrite?"),
        (["--xyz"], "disha it does not take --xyz"),
        (["--max_error", "many"], "--max_error: invalid float value: 'many'"),
        (["--max_error"], "expected one argument; see disha it --help"),
    ],
)
def test_a_wrong_flag_is_named(words, says):
    with pytest.raises(disha.ArgumentError) as found:
        parser().parse(words)
    assert says in str(found.value)


# --- exit codes ----------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch):
    """Let a command `it` be what a test gives."""

    def install(main):
        module = types.ModuleType("disha.cli.it")
        module.main = main
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(COMMANDS, "it", "")

    return install


def raising(error, cause=None):
    def main(words):
        raise error from cause

    return main


FULL = OSError(errno.ENOSPC, "No space left on device")
GONE = FileNotFoundError(errno.ENOENT, "No such file")


@pytest.mark.parametrize(
    ("error", "cause", "code"),
    [
        (disha.ArgumentError("x"), None, 2),
        (disha.ArgumentTypeError("x"), None, 2),
        (disha.AdapterFileError("x"), None, 2),
        (disha.AdapterFileError("x"), FULL, 2),
        (disha.MergeError("x"), None, 2),
        (disha.AdapterIOError("it is a folder"), None, 2),
        (disha.AdapterIOError("x"), GONE, 2),
        (GONE, None, 2),
        (PermissionError(errno.EACCES, "x"), None, 2),
        (FileExistsError(errno.EEXIST, "x"), None, 2),
        (disha.AdapterIOError("x"), OSError(errno.ENAMETOOLONG, "x"), 2),
        (disha.AdapterIOError("x"), FULL, 1),
        (FULL, None, 1),
        (ValueError("of another library"), None, 1),
        (KeyboardInterrupt(), None, 130),
    ],
)
def test_exit_code_by_what_went_wrong(run, command, error, cause, code):
    command(raising(error, cause))
    done = run("it")
    assert done.code == code
    assert done.complaint


@pytest.mark.parametrize("fill", [lambda: torch.empty(2**45), lambda: bytes(2**55)])
def test_too_little_memory_is_told_in_our_words(run, command, fill):
    command(lambda words: fill())
    done = run("it")
    assert done.code == 1
    assert done.complaint == ("disha: there is not enough memory for this adapter and its layers\n")


def test_a_wrong_path_is_named_in_our_words(complaint, command):
    command(raising(FileExistsError(errno.EEXIST, "File exists", "here/it")))
    assert complaint("it") == "disha: can't use here/it: File exists; check the path\n"


@pytest.mark.parametrize(("answer", "code"), [(None, 0), (0, 0), (1, 1)])
def test_a_command_gives_its_own_exit_code(run, command, answer, code):
    command(lambda words: answer)
    assert run("it").code == code


def test_the_words_after_a_commands_name_are_its_own(run, command):
    command(print)
    assert run("it", "--version", "x").out == "['--version', 'x']\n"


def test_an_error_of_several_lines_becomes_one(run, command):
    command(raising(disha.AdapterFileError("these differ:\n0: a\n1: b\x1b[2J")))
    assert run("it").complaint == "disha: these differ: 0: a; 1: b\\x1b[2J\n"


def test_what_the_user_cannot_correct_fails(run, command):
    command(raising(disha.DishaError("do not use the file")))
    assert run("it").code == 1


def test_debug_shows_where_an_error_came_from(run, command):
    command(raising(KeyError("x")))
    assert run("it").complaint == "disha: KeyError: 'x'\n"
    found = run("it", "--debug")
    assert found.code == 1
    assert "Traceback" in found.err
    assert found.err.endswith("disha: KeyError: 'x'\n")


def test_a_missing_package_gives_its_install_line(complaint, command):
    def main(words):
        import no_such_package  # noqa: F401

    command(main)
    told = complaint("it")
    assert "no_such_package is missing; in a checkout of disha, run:" in told
    assert 'pip install ".[finetune]"' in told


def test_a_warning_is_one_line(run, command):
    def warn(words):
        warnings.warn("the base is another", AdapterFileWarning, stacklevel=1)
        warnings.warn("for programmers", FutureWarning, stacklevel=1)
        warnings.warn("of source that is compiled now", SyntaxWarning, stacklevel=1)

    command(warn)
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
    assert process.wait() == 1


def test_the_environment_and_the_logging_of_a_host_stay_as_they_are(run, command, monkeypatch):
    monkeypatch.setenv("TQDM_LEAVE", "x")
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    during = []
    command(lambda words: during.append((os.environ["TQDM_DISABLE"], os.environ["TQDM_LEAVE"])))
    logging.disable(logging.WARNING)
    try:
        run("it")
        assert logging.root.manager.disable == logging.WARNING
    finally:
        logging.disable(logging.NOTSET)
    assert during == [("1", "")]
    assert os.environ["TQDM_LEAVE"] == "x"
    assert "TQDM_DISABLE" not in os.environ


# --- as a program --------------------------------------------------------------------------------


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # Python's mark of a module that must not be imported
from disha.cli import main
print([main(words.split()) for words in ("", "--help", "--version", "trian")])
"""


def test_help_imports_nothing():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True)
    assert done.stdout.endswith("[0, 0, 0, 2]\n")
    assert done.stderr == "disha: 'trian' is not a command\n"


@pytest.mark.parametrize("words", ["finetune --help", "evaluate --base x"])
def test_without_the_extra_a_command_says_at_once_what_to_install(words):
    """Python runs without installed packages here: not even torch can be imported."""
    code = f"from disha.cli import main; print(main({words.split()}))"
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "2\n"
    install = 'in a checkout of disha, run: pip install ".[finetune]"'
    assert done.stderr == f"disha: the package trl is missing; {install}\n"


def test_inspect_needs_no_transformers(files):
    code = (
        "import sys; from disha.cli import main; main(sys.argv[1:]);"
        "print({'transformers', 'trl', 'datasets', 'peft'} & set(sys.modules))"
    )
    words = [sys.executable, "-c", code, "inspect", str(files.adapter())]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.stdout.endswith("set()\n")


def test_as_the_installed_script_and_as_a_module():
    script = Path(sys.executable).with_name("disha")
    for words in ([script], [sys.executable, "-m", "disha"]):
        done = subprocess.run([*words, "--version"], capture_output=True, text=True)
        assert done.stdout == f"disha {disha.__version__}\n"
