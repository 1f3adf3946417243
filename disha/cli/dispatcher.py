"""From the arguments to the command, and from what happens to an exit code."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from disha.cli.exit_codes import DONE, FAILED, INTERRUPTED, TROUBLE
from disha.errors import DishaError
from disha.files import AdapterFileWarning
from disha.text import printable
from disha.version import __version__

__all__ = ["COMMANDS", "Command", "main"]


@dataclass(frozen=True)
class Command:
    """One sub-command.

    Args:
        summary: what it does, for the help.
        module: where its `run(arguments)` is, which returns an exit code or None for done.
        extra: the extra of the distribution that it needs.
        packages: what that extra must have installed.
        answers: whether it answers a question: exit code 1 is then the answer "no", and nothing
            that goes wrong.
    """

    summary: str
    module: str
    extra: str = "cli"
    packages: tuple[str, ...] = ("tqdm", "tyro")
    answers: bool = False


FINETUNE_PACKAGES = (
    *("gguf", "jinja2", "matplotlib", "numpy", "pyarrow", "rich", "tensorboard", "tokenizers"),
    *("tqdm", "tyro", "yaml"),
)

COMMANDS = {
    "inspect": Command(
        summary="show what an adapter file holds",
        module="disha.cli.inspect",
        answers=True,
    ),
    "diff": Command(
        summary="show what differs between two adapter files",
        module="disha.cli.diff",
        answers=True,
    ),
    "verify": Command(
        summary="check an adapter file, and whether it is for a base checkpoint",
        module="disha.cli.verify",
        answers=True,
    ),
    "convert": Command(
        summary="turn an adapter into one for PEFT, LoRA runtimes or llama.cpp, or back",
        module="disha.cli.convert",
    ),
    "combine": Command(
        summary="write the weighted sum of adapters, exactly",
        module="disha.cli.combine",
    ),
    "merge": Command(
        summary="write a base checkpoint with an adapter merged into it",
        module="disha.cli.merge",
    ),
    "finetune": Command(
        summary="fine-tune a language model with Bone or BAT adapters",
        module="disha.cli.finetune",
        extra="finetune",
        packages=FINETUNE_PACKAGES,
    ),
    "generate": Command(
        summary="let a model answer, with an adapter or without",
        module="disha.cli.generate",
        extra="finetune",
        packages=FINETUNE_PACKAGES,
    ),
    "evaluate": Command(
        summary="measure a model on rows: loss, perplexity, exact answers",
        module="disha.cli.evaluate",
        extra="finetune",
        packages=FINETUNE_PACKAGES,
    ),
}

NAMED = re.compile(
    r"\b(architecture|base|dropout|force|heads|kv_heads|max_error|overwrite|rank)"
    r"=(?:True\b|(?=[\s,;:.)]|$))"
)
"""Arguments as the library's errors ask for them: `rank=`, `force=True`."""

OF_A_PATH = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
"""What the system says where a path leads to nothing, or to the wrong thing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after the program's name; those of this process if not given.

    Returns:
        The exit code, as `disha.cli.exit_codes` says.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        # Only the first argument is ours; what follows a command's name is that command's.
        name = _parser().parse_args(arguments[:1]).command
    except SystemExit as request:
        return _requested(request)
    command = COMMANDS[name]
    try:
        with _plain_warnings():
            return _run(command, arguments[1:])
    except SystemExit as request:
        return _requested(request)
    except KeyboardInterrupt as interruption:
        _complain(str(interruption) or "interrupted; every file that was written is complete")
        return INTERRUPTED
    except BrokenPipeError:
        # Nobody reads on, as with `| head`. What is still in the buffer must not go there at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return TROUBLE if command.answers else FAILED
    except (DishaError, OSError) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        _complain(str(error))
        return TROUBLE if command.answers else _exit_code(error)
    except Exception:
        # The interpreter would leave with 1, which some commands mean something by.
        traceback.print_exc()
        return TROUBLE if command.answers else FAILED


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:12}{command.summary}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="disha",
        usage="disha COMMAND [flags]",
        description="Dimension-sharded adapters (Bone, BAT) for PyTorch models.",
        epilog=f"commands:\n{listed}\n\n'disha COMMAND --help' tells more, with examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"disha {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="what to do")
    return parser


def _run(command: Command, arguments: Sequence[str]) -> int:
    missing = [name for name in command.packages if importlib.util.find_spec(name) is None]
    if missing:
        _complain(
            f"this command needs {', '.join(missing)}, not installed here; "
            f'run: pip install "disha-torch[{command.extra}]"'
        )
        return TROUBLE
    code: int | None = importlib.import_module(command.module).run(arguments)
    sys.stdout.flush()
    return DONE if code is None else code


def _requested(request: SystemExit) -> int:
    return request.code if isinstance(request.code, int) else DONE


def _exit_code(error: Exception) -> int:
    # Bad values and missing packages are for the user to put right, and so are paths that lead to
    # nothing or to the wrong thing; anything else went wrong here.
    if isinstance(error, (ValueError, TypeError, ImportError)):
        return TROUBLE
    if not isinstance(error, OSError):
        return FAILED
    cause: BaseException = error
    while isinstance(cause.__cause__, OSError):
        cause = cause.__cause__
    return TROUBLE if isinstance(cause, (DishaError, *OF_A_PATH)) else FAILED


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Let what the library warns of be one line, without the place in its code."""
    with warnings.catch_warnings():
        shown_otherwise = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: object) -> None:
            if issubclass(category, AdapterFileWarning):
                _complain(f"warning: {message}")
            else:
                shown_otherwise(message, category, *place)  # type: ignore[arg-type]

        warnings.showwarning = show  # type: ignore[assignment]
        warnings.simplefilter("always", AdapterFileWarning)
        yield


def _complain(message: str) -> None:
    """Say what is wrong in one line."""
    flags = NAMED.sub(lambda found: f"--{found[1].replace('_', '-')}", message)
    flags = flags.replace("also_train=False", "--no-also-train")
    print(f"disha: {printable('; '.join(flags.splitlines()))}", file=sys.stderr)
