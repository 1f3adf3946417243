"""The command line `disha COMMAND`. Each command is a module of this package, with its name.

`dispatcher` imports the module of a command only to run it, so that every command starts fast.
"""

from disha.cli.dispatcher import COMMANDS, main

__all__ = ["COMMANDS", "main"]
