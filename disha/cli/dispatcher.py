"""Run the command that the command line names, and return its exit code."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from typing import Any, TextIO

from disha.errors import AdapterFileWarning, ArgumentError, DishaError
from disha.finetune.flags import FlagParser
from disha.text import nearest, printable
from disha.version import __version__

DONE, FAILED, TROUBLE, INTERRUPTED = 0, 1, 2, 130
"""Exit codes. Failed: the work failed, or the answer of a command is no. Trouble: an input can't be
used, and the user can correct it."""

COMMANDS = {
    "finetune": "train an adapter for a language model",
    "generate": "answer prompts, with or without an adapter",
    "evaluate": "measure a model on rows: loss, perplexity, exact answers",
    "inspect": "show what an adapter file holds, and whether it belongs to a base",
    "convert": "convert an adapter for PEFT, LoRA runtimes or diffusers, or back",
    "check-server": "say whether a server answers with an adapter as the model here does",
    "merge": "write a base model with an adapter merged into its weights",
}
BAD_PATH = (
    *(FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError),
    PermissionError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: the words after the name of the program, or those of this process.

    Return the exit code. The help of a command ends the process, as in any program of argparse.
    """
    words = sys.argv[1:] if argv is None else argv
    debug = "--debug" in words
    with _quiet_screen(debug):
        try:
            code = _run([word for word in words if word != "--debug"])
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            _complain("interrupted; adapters, merged models, reports and cards are whole")
            return INTERRUPTED
        except BrokenPipeError:  # the reader has closed the pipe, as `| head` does
            _silence(sys.stdout)
            return FAILED
        except Exception as error:
            if debug:
                traceback.print_exc()
            _complain(_describe(error))
            return TROUBLE if _is_bad_input(error) else FAILED


@contextmanager
def _quiet_screen(debug: bool) -> Iterator[None]:
    """Print warnings as lines of this command, and let other libraries draw and log less."""
    # tqdm asks for these when it is imported.
    bars = {"TQDM_LEAVE": ""}
    if not (sys.stderr.isatty() and _is_first()):
        bars["TQDM_DISABLE"] = "1"
    before = {name: os.environ[name] for name in bars if name in os.environ}
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        if not debug:
            logging.disable(logging.ERROR)  # libraries log what they also raise
        os.environ.update(bars)
        try:
            yield
        finally:
            logging.disable(disabled)
            for name in bars:
                os.environ.pop(name, None)
            os.environ.update(before)


def _run(words: Sequence[str]) -> int:
    name = words[0] if words else "--help"
    if name in ("-h", "--help", "--version"):
        text = f"disha {__version__}" if name == "--version" else _help()
        print(text)
        return DONE
    if name not in COMMANDS:
        raise ArgumentError(f"{name!r} is not a command{nearest(name, COMMANDS)}")
    if name in ("finetune", "evaluate"):
        version("trl")  # where the extra is not installed, this raises before torch is imported
    module = "disha.finetune" if name == "finetune" else f"disha.cli.{name.replace('-', '_')}"
    return import_module(module).main(words[1:]) or DONE


def _help() -> str:
    listed = "\n".join(f"  {name:14}{summary}" for name, summary in COMMANDS.items())
    return (
        "usage: disha COMMAND [flags]\n\nDimension-sharded adapters (Bone, BAT) and LoRA, for "
        f"PyTorch models.\n\ncommands:\n{listed}\n\n'disha COMMAND --help' shows the flags of one."
    )


class Parser(FlagParser):
    """The flags of one command."""

    def __init__(self, name: str, about: str | None) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(f"disha {name}", description=about, formatter_class=form)
        self.add_argument("--debug", action="store_true", help="show where an error came from")


def _describe(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        package = str(error.name).partition(".")[0]
        return (
            f"the package {package} is missing; in a checkout of disha, run: "
            'pip install ".[finetune]"'
        )
    if isinstance(error, (DishaError, AdapterFileWarning)):
        return str(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # as torch says it
        return "there is not enough memory for this adapter and its layers"
    if isinstance(error, BAD_PATH) and error.filename is not None:
        return f"can't use {error.filename}: {error.strerror}; check the path"
    return f"{type(error).__name__}: {error}"


def _is_bad_input(error: BaseException) -> bool:
    """Return whether the user can correct it: a value, a missing package, or a wrong path."""
    while isinstance(error, OSError) and isinstance(error.__cause__, OSError):
        error = error.__cause__
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return True
    if type(error) is DishaError:  # no input is wrong: a saved file, a server, torch
        return False
    return isinstance(error, (DishaError, AdapterFileWarning, ImportError, *BAD_PATH))


def _show_warning(message: Warning | str, category: type[Warning], *place: Any) -> None:
    for_programmers = (DeprecationWarning, FutureWarning, SyntaxWarning)
    if not issubclass(category, for_programmers) and _is_first():
        _complain(f"warning: {message}")


def _complain(message: str) -> None:
    """Print one line, also to a closed terminal. Of several processes, others name their rank."""
    line = "; ".join(message.splitlines()).replace(":; ", ": ")
    name = "disha" if _is_first() else f"disha, rank {os.environ['RANK']}"
    try:
        print(f"{name}: {printable(line)}", file=sys.stderr, flush=True)
    except OSError:
        _silence(sys.stderr)


def _is_first() -> bool:
    """Return whether this is the first of several processes, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def _silence(stream: TextIO) -> None:
    """Discard everything that is still to be written to a stream."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
