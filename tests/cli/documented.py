"""The examples in docs/cli.md and docs/finetuning.md: run as they stand there.

`python -m tests.cli.documented` puts what the commands print now into docs/cli.md.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from disha.cli import main
from tests.cli.model_files import write_files, write_guide_files

__all__ = [
    "GUIDE",
    "PAGE",
    "consoles",
    "prepared",
    "prepared_guide",
    "printed",
    "run_in_shell",
    "shell_commands",
    "steady",
]

DOCS = Path(__file__).parents[2] / "docs"
PAGE, GUIDE = DOCS / "cli.md", DOCS / "finetuning.md"
CONSOLE = re.compile(r"(?<=```console\n).*?(?=```)", re.DOTALL)
PYTHON = re.compile(r"(?<=```python\n).*?(?=```)", re.DOTALL)
SHELL = re.compile(r"(?<=```sh\n).*?(?=```)", re.DOTALL)
NAMED_FILE = re.compile(r"```(?:python|yaml)\n# (?P<name>\S+)\n(?P<content>.*?)```", re.DOTALL)


def consoles(page: str) -> list[str]:
    """Return the examples of a page, each a few commands with what they print."""
    return CONSOLE.findall(page)


@contextlib.contextmanager
def prepared(page: str) -> Iterator[None]:
    """Stay in a folder with the files that the page's Python makes, and a tiny model."""
    with _staying_in_a_folder() as folder:
        for code in PYTHON.findall(page):
            exec(compile(code, "docs/cli.md", "exec"), {"__name__": "__main__"})
        write_files(folder)
        yield


def printed(console: str) -> str:
    """Return an example with what its commands print now, and exit codes that are not 0."""
    lines = []
    for command in re.findall(r"^\$ (?:.*\\\n)*.*", console, re.MULTILINE):
        words = shlex.split(command.removeprefix("$ ").replace("\\\n", " "))
        assert words[0] == "disha", command
        code, said = _run(words[1:])
        lines += [command, *(line.rstrip() for line in said.rstrip("\n").split("\n"))]
        lines += [f"[exit code {code}]"] if code else []
    return "\n".join(lines) + "\n"


def steady(console: str) -> str:
    """Return an example without what differs from machine to machine: measured numbers.

    Counts of steps, rows and answers stay; so does everything where no model runs.
    """
    if not re.search(r"^\$ disha (finetune|generate|evaluate) ", console, re.MULTILINE):
        return console
    lines = [
        line if line.startswith("$") else re.sub(r"\d+\.\d+|\d+(?= tokens/s| s )", "#", line)
        for line in console.splitlines()
    ]
    return "\n".join(line if line.startswith("$") else " ".join(line.split()) for line in lines)


@contextlib.contextmanager
def prepared_guide(page: str) -> Iterator[None]:
    """Stay in a folder with tiny models, rows, and the files that the guide shows."""
    with _staying_in_a_folder() as folder:
        write_guide_files(folder)
        for found in NAMED_FILE.finditer(page):
            (folder / found["name"]).write_text(found["content"], encoding="utf-8")
        yield


def shell_commands(page: str) -> list[str]:
    """Return the commands of a page, each on one line; those that install are left out."""
    blocks = (block.replace("\\\n", " ") for block in SHELL.findall(page))
    commands = [line for block in blocks for line in block.splitlines()]
    return [" ".join(command.split()) for command in commands if not command.startswith("pip ")]


def run_in_shell(command: str, more: Sequence[str] = ()) -> tuple[int, str]:
    """Run `disha ...` here, or `torchrun ...` by itself; return the exit code and what it printed.

    Args:
        command: as a reader types it.
        more: flags to add.
    """
    words = [*shlex.split(command), *more]
    if words[0] == "torchrun":
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *words[1:]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return done.returncode, done.stdout
    assert words[0] == "disha", command
    return _run(words[1:])


def _run(words: Sequence[str]) -> tuple[int, str]:
    """Run `disha` with these words; return the exit code, and what a terminal would show."""
    shown = io.BytesIO()
    said = io.TextIOWrapper(shown, encoding="utf-8", write_through=True)
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(words)
    return code, shown.getvalue().decode()


@contextlib.contextmanager
def _staying_in_a_folder() -> Iterator[Path]:
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def rewrite() -> None:
    """Write what the commands print now into the page."""
    page = PAGE.read_text(encoding="utf-8")
    with prepared(page):
        page = CONSOLE.sub(lambda found: printed(found.group()), page)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(rewrite())
