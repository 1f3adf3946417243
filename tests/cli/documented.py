"""The examples in docs/cli.md: run as they stand there, and written anew.

`python -m tests.cli.documented` puts what the commands print now into the page.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from disha.cli import main

__all__ = ["PAGE", "consoles", "prepared", "printed"]

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
CONSOLE = re.compile(r"(?<=```console\n).*?(?=```)", re.DOTALL)
PYTHON = re.compile(r"(?<=```python\n).*?(?=```)", re.DOTALL)


def consoles(page: str) -> list[str]:
    """Return the examples of a page, each a few commands with what they print."""
    return CONSOLE.findall(page)


@contextlib.contextmanager
def prepared(page: str) -> Iterator[None]:
    """Stay in a folder with the files that the page's Python makes."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for code in PYTHON.findall(page):
                exec(compile(code, "docs/cli.md", "exec"), {"__name__": "__main__"})
            yield
        finally:
            os.chdir(before)


def printed(console: str) -> str:
    """Return an example with what its commands print now, and exit codes that are not 0."""
    lines = []
    for command in re.findall(r"^\$ .*(?:\\\n.*)*", console, re.MULTILINE):
        words = shlex.split(command.removeprefix("$ "))
        assert words[0] == "disha", command
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = main(words[1:])
        lines += [command, said.getvalue().rstrip("\n")]
        lines += [f"[exit code {code}]"] if code else []
    return "\n".join(lines) + "\n"


def rewrite() -> None:
    """Write what the commands print now into the page."""
    page = PAGE.read_text(encoding="utf-8")
    with prepared(page):
        page = CONSOLE.sub(lambda found: printed(found.group()), page)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(rewrite())
