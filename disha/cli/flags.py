"""What the commands' arguments have in common, and how they are parsed."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from disha.cli.exit_codes import TROUBLE
from disha.cli.helping import registry

__all__ = ["FileArgument", "Flags", "parsed"]

FileArgument = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]


@dataclass(frozen=True)
class Flags:
    """The arguments of a command; each of its own adds to these."""

    json: bool = field(default=False, kw_only=True)
    """Print one JSON object, for scripts."""

    debug: bool = field(default=False, kw_only=True)
    """Show where an error came from."""


T = TypeVar("T")

_SPELLING = (tyro.conf.FlagCreatePairsOff, tyro.conf.UseAppendAction)
_SPELLING_OF_GROUPS = (
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.OmitArgPrefixes,
    tyro.conf.DisallowNone,
)


def parsed(
    flags: type[T],
    name: str,
    arguments: Sequence[str],
    description: str,
    default: T | None = None,
) -> T:
    """Return the arguments of a command.

    Args:
        flags: what they are.
        name: the command's name.
        arguments: the words after it.
        description: what the help starts with.
        default: what is not given is as here.

    Raises:
        SystemExit: the arguments are not understood, or ask for help.
    """
    # The parser draws a box around what is wrong; where nobody looks at it, one line has to do.
    said = io.StringIO()
    # Of several processes (torchrun), which all have the same arguments, the first one speaks.
    speaks = os.environ.get("RANK", "0") == "0"
    try:
        with nullcontext() if speaks and sys.stderr.isatty() else redirect_stderr(said):
            return tyro.cli(  # type: ignore[return-value]
                flags,
                prog=f"disha {name}",
                description=description,
                args=arguments,
                default=default,
                config=_SPELLING if default is None else _SPELLING_OF_GROUPS,
                use_underscores=default is not None,
                registry=registry,
            )
    except SystemExit as request:
        if speaks and request.code == TROUBLE and said.getvalue():
            print(f"disha {name}: {_one_line(said.getvalue())}", file=sys.stderr)
        raise


def _one_line(box: str) -> str:
    """Return what a box says is wrong: not its title, its frame, nor the help of the flag."""
    sections = re.split("[\u2500-]{3,}", re.sub("[\u2502\u256d-\u2570]", " ", box))
    said = [section for section in sections[1:] if "Argument helptext:" not in section]
    return " ".join(" ".join(said).split())
