"""The command line `disha COMMAND`. The module of a command is imported only to run it."""

from disha.cli.dispatcher import COMMANDS, main

__all__ = ["COMMANDS", "main"]
