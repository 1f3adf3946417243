"""The command line, `disha COMMAND`: `dispatcher` finds the command, one file each runs them.

Nothing that only one command needs is imported before that command runs.
"""

from disha.cli.dispatcher import COMMANDS, main

__all__ = ["COMMANDS", "main"]
