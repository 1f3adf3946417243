"""The command line, `disha COMMAND`: `dispatcher` runs the command, each in a module of its name.

What only one command needs is imported when that command runs.
"""

from disha.cli.dispatcher import COMMANDS, main

__all__ = ["COMMANDS", "main"]
