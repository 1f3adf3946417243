"""Run the command that the command line names, and return its exit code.

| code | meaning |
|---|---|
| 0 | done; for `diff`: nothing differs, for `verify`: the file is sound |
| 1 | for `diff`: something differs, for `verify`: the file is not sound; for commands that write: the work failed, for example because the disk is full |
| 2 | wrong usage, or the input can't be used; for `inspect`, `diff` and `verify`: also any other failure |
| 128 + n | stopped by signal n: 130 by Ctrl-C (SIGINT), 143 by SIGTERM, 129 by SIGHUP |
"""  # noqa: E501

from __future__ import annotations

import importlib
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from disha.cli.meanings import COMMAND_WORDS, in_flags, nearest
from disha.errors import AdapterFileWarning, ArgumentError, DishaError
from disha.text import printable, silence, tell
from disha.version import __version__

__all__ = [
    "COMMANDS",
    "DONE",
    "FAILED",
    "NO",
    "SIGNALLED",
    "TROUBLE",
    "Command",
    "debugging",
    "main",
]

DONE = 0
NO = FAILED = 1
TROUBLE = 2
SIGNALLED = 128
"""The exit code after a signal is this number plus that of the signal, as in shells."""


@dataclass(frozen=True)
class Command:
    """One command. Its work is the function `run(arguments)` in the module `disha.cli.<its name>`.

    The function returns an exit code, or None for 0.

    Args:
        summary: what it does, for the help.
        extra: the extra of the distribution that it needs.
        answers: whether it answers a question. Then its exit code 1 means "no", and never a
            failure.
        flags: an argument of the library -> the flag that sets it. Errors of the library name
            arguments, and the command names flags instead.
    """

    summary: str
    extra: str = "cli"
    answers: bool = False
    flags: Mapping[str, str] = field(default_factory=dict)


def _flags(same: str, **others: str) -> dict[str, str]:
    """Return the flags of arguments, as `Command.flags` holds them.

    Args:
        same: the flags that have the names of their arguments, separated by spaces.
        others: an argument -> its flag with another name.
    """
    return {name.replace("-", "_"): f"--{name}" for name in same.split()} | others


COMMANDS = {
    "inspect": Command("show what an adapter file holds", answers=True),
    "diff": Command("show what differs between two adapter files", answers=True),
    "verify": Command(
        "check an adapter file, and whether it belongs to a base checkpoint", answers=True
    ),
    "convert": Command(
        "convert an adapter for PEFT, LoRA runtimes or llama.cpp, or back",
        flags=_flags(
            "rank base max-error pad-rank architecture heads kv-heads dropout",
            also_train="--no-also-train",
            exclude="disha finetune --exclude",
        ),
    ),
    "combine": Command("write the weighted sum of adapters"),
    "merge": Command(
        "write a base checkpoint with an adapter merged into it",
        flags=_flags("force overwrite dtype scale", also_train="--no-also-train"),
    ),
    "finetune": Command(
        "fine-tune a model with Bone or BAT adapters",
        extra="finetune",
        flags=_flags(
            "method exclude rank_pattern also_train",
            target_regex="--target",
            r="--bone_r",
            r_out="--bone_r_out",
            dropout="--adapter_dropout",
        ),
    ),
    "generate": Command("answer prompts, with or without an adapter", extra="finetune"),
    "evaluate": Command(
        "measure a model on rows: loss, perplexity, exact answers", extra="finetune"
    ),
}

debugging = ContextVar("debugging", default=False)
"""Whether an error shows where it came from. A command sets it when it has parsed its flags."""

BAD_PATH = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
"""System errors that mean a wrong path, not a failure during the work."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after the program's name; those of this process by default.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    failed = TROUBLE
    command = Command("")
    debugging.set("--debug" in arguments)  # until the command has parsed its flags
    try:
        # Only the first argument is read here. The others belong to the command.
        name = arguments[0] if arguments else "--help"
        if name in ("-h", "--help", "--version"):
            print(f"disha {__version__}" if name == "--version" else _help())
            return DONE
        if name not in COMMANDS:
            near = nearest(name, COMMANDS, COMMAND_WORDS)
            hint = "" if near is None else f"did you mean {near}? "
            raise ArgumentError(f"{name!r} is not a command; {hint}disha --help lists all")
        command = COMMANDS[name]
        failed = TROUBLE if command.answers else FAILED
        with _short_warnings(command):
            return _run(name, arguments[1:])
    except SystemExit as request:
        return request.code if isinstance(request.code, int) else DONE
    except KeyboardInterrupt as interruption:
        number = getattr(interruption, "number", signal.SIGINT)
        if argv is None:  # the process ends now; another signal must not change its exit code
            for one in (number, signal.SIGINT):
                signal.signal(one, signal.SIG_IGN)
        _complain(str(interruption) or "interrupted; every file that was written is complete")
        return SIGNALLED + number
    except BrokenPipeError:
        # The reader has closed the pipe, as `| head` does. Python must not write the rest when it
        # ends.
        silence(sys.stdout)
        return failed
    except (DishaError, OSError) as error:
        if debugging.get():
            traceback.print_exc()
        is_library = type(error).__module__ == DishaError.__module__
        _complain(in_flags(str(error), command.flags) if is_library else str(error))
        return TROUBLE if _is_bad_input(error) else failed
    except ModuleNotFoundError as error:
        if debugging.get():
            traceback.print_exc()
        package = str(error.name).partition(".")[0]
        _complain(
            f"this command needs the package {package}, which is not installed; run: "
            f'pip install "disha-torch[{command.extra}]"'
        )
        return TROUBLE
    except Exception:
        # Python's own exit code for an exception is 1, which means "no" for some commands.
        traceback.print_exc()
        return failed


def _help() -> str:
    listed = "\n".join(f"  {name:12}{command.summary}" for name, command in COMMANDS.items())
    return f"""usage: disha COMMAND [flags]

Dimension-sharded adapters (Bone, tile, BAT) for PyTorch models.

commands:
{listed}

'disha COMMAND --help' shows details and examples. 'disha --version' shows the version."""


def _run(name: str, arguments: Sequence[str]) -> int:
    code: int | None = importlib.import_module(f"disha.cli.{name}").run(arguments)
    sys.stdout.flush()
    return DONE if code is None else code


def _is_bad_input(error: Exception) -> bool:
    """Return whether the user can correct it: a value, a missing package, or a wrong path."""
    if isinstance(error, (ValueError, TypeError, ImportError)):
        return True
    cause: BaseException = error
    while isinstance(cause.__cause__, OSError):
        cause = cause.__cause__
    # A DishaError that no system error has caused is about a path, such as that of a folder.
    return isinstance(error, OSError) and isinstance(cause, (DishaError, *BAD_PATH))


@contextmanager
def _short_warnings(command: Command) -> Iterator[None]:
    """Show warnings of the library in one line, without the line of code."""
    package = str(Path(__file__).parents[1])
    with warnings.catch_warnings():
        show_others = warnings.showwarning

        def show(
            message: Warning | str, category: type[Warning], file: str, *place: object
        ) -> None:
            if issubclass(category, AdapterFileWarning) or file.startswith(package):
                _complain(f"warning: {in_flags(str(message), command.flags)}")
            else:
                show_others(message, category, file, *place)  # type: ignore[arg-type]

        warnings.showwarning = show  # type: ignore[assignment]
        warnings.simplefilter("always", AdapterFileWarning)
        yield


def _complain(message: str) -> None:
    line = "; ".join(message.splitlines()).replace(":; ", ": ")  # a list follows a colon
    tell(f"disha: {printable(line)}", sys.stderr)
