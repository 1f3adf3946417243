"""The command line: ``disha finetune ...``.

Nothing that only one command needs is imported before that command runs.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from disha.errors import DishaError
from disha.version import __version__

__all__ = ["main"]

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True)
class Command:
    """One sub-command.

    Args:
        summary: what it does, for the help.
        module: where its `run(arguments)` is.
        extra: the extra of the distribution that it needs.
        packages: what that extra must have installed.
    """

    summary: str
    module: str
    extra: str
    packages: tuple[str, ...]


COMMANDS = {
    "finetune": Command(
        summary="fine-tune a language model with Bone or BAT adapters",
        module="disha.finetune.command",
        extra="finetune",
        packages=("gguf", "matplotlib", "numpy", "tokenizers", "tqdm", "tyro"),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after the program's name; those of this process if not given.

    Returns:
        The exit code: 0 done, 1 failed while working, 2 wrong usage or bad input, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        # Only the first argument is ours; what follows a command's name is that command's.
        name = _parser().parse_args(arguments[:1]).command
        _run(COMMANDS[name], arguments[1:])
    except SystemExit as request:
        return request.code if isinstance(request.code, int) else DONE
    except KeyboardInterrupt:
        _complain("interrupted; every file that was written is complete")
        return INTERRUPTED
    except (DishaError, OSError) as error:
        if "--debug" in arguments:
            raise
        _complain(str(error))
        return _exit_code(error)
    return DONE


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:12}{command.summary}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="disha",
        usage="disha COMMAND [flags]",
        description="Dimension-sharded adapters (Bone, BAT) for PyTorch models.",
        epilog=f"commands:\n{listed}\n\n'disha COMMAND --help' tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"disha {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="what to do")
    return parser


def _run(command: Command, arguments: Sequence[str]) -> None:
    missing = [name for name in command.packages if importlib.util.find_spec(name) is None]
    if missing:
        _complain(
            f"this command needs {', '.join(missing)}, not installed here; "
            f'run: pip install "disha-torch[{command.extra}]"'
        )
        raise SystemExit(BAD_INPUT)
    importlib.import_module(command.module).run(arguments)


def _exit_code(error: Exception) -> int:
    # Bad values and missing packages are for the user to put right; anything else went wrong here.
    return BAD_INPUT if isinstance(error, (ValueError, TypeError, ImportError)) else FAILED


def _complain(message: str) -> None:
    print(f"disha: {message}", file=sys.stderr)
