"""How the arguments of a command are parsed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

__all__ = ["FileArgument", "Flags", "parsed"]

FileArgument = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]


@dataclass(frozen=True)
class Flags:
    """The arguments that the commands for files share.

    Args:
        json: Print one JSON object, for scripts.
        debug: Show where an error came from.
    """

    json: bool = field(default=False, kw_only=True)
    debug: bool = field(default=False, kw_only=True)


T = TypeVar("T")


def parsed(
    flags: type[T],
    name: str,
    arguments: Sequence[str],
    description: str,
    default: T | None = None,
) -> T:
    """Return the arguments of a command.

    Args:
        flags: a dataclass with a field for each. Its docstring is the help.
        name: the command's name.
        arguments: the words after it.
        description: the start of the help.
        default: the values of arguments that are not given. With it, the help spells flags with
            underscores. Both spellings are always accepted.

    Raises:
        SystemExit: the arguments are invalid, and the reason is printed; or they ask for help.
    """
    return tyro.cli(  # type: ignore[return-value]
        flags,
        prog=f"disha {name}",
        description=description,
        args=arguments,
        default=default,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone),
        use_underscores=default is not None,
        # Under torchrun, all processes have the same arguments, so only the first prints errors.
        console_outputs=os.environ.get("RANK", "0") == "0",
    )
