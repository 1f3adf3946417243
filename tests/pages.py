"""The code of a Markdown page, run as it stands there, one block after the other.

- a `python` block runs in a namespace that all blocks of the page share;
- one whose first line is `# name.py` is a script: it is written to that file instead;
- the commands of an `sh` block run if they are `torchrun ...`, and are left to other tests if not;
- a `text` block that follows is exactly what was printed.

`python -m tests.pages <page>...` puts what is printed now into pages.
"""

import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"
BLOCK = re.compile(
    r"^```(?P<language>python|sh)\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```)?",
    re.DOTALL | re.MULTILINE,
)
SCRIPT = re.compile(r"# (?P<name>\w+\.py)\n")
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
SECONDS = 240
"""Ten times what a script takes on two slow cores."""


@dataclass(frozen=True)
class Block:
    """A block of code, what the page says that it prints, and the line where it begins."""

    language: str
    code: str
    output: str | None
    line: int

    @property
    def script(self) -> str | None:
        """The file that the code is to be written to, if it is one."""
        found = SCRIPT.match(self.code) if self.language == "python" else None
        return found and found["name"]


def blocks_of(text: str) -> list[Block]:
    """Return the blocks of a page."""
    return [
        Block(m["language"], m["code"], m["output"], 1 + text.count("\n", 0, m.start("code")))
        for m in BLOCK.finditer(text)
    ]


def links_of(text: str) -> list[str]:
    """Return where the links and pictures of a page lead, code left out."""
    return LINK.findall(re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def tables_of(text: str) -> list[list[list[str]]]:
    """Return the tables of a page, each as its lines of cells without the rule."""
    tables, lines = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            lines.append([cell.strip() for cell in line.strip("|").split("|")])
        elif lines:
            tables.append([lines[0], *lines[2:]])
            lines = []
    return tables


class Page:
    """A page whose blocks are run, in the current folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = path.read_text(encoding="utf-8")
        self.blocks = blocks_of(self.text)
        self.main = ModuleType("__main__")

    def run(self) -> Iterator[tuple[Block, str]]:
        """Run the blocks in their order; yield each with what it printed."""
        torch.manual_seed(0)
        for block in self.blocks:
            yield block, self._printed(block)

    def _printed(self, block: Block) -> str:
        if block.language == "sh":
            return _said_by(_commands(block.code))
        if block.script is not None:
            Path(block.script).write_text(block.code, encoding="utf-8")
            return ""
        lines = "\n" * (block.line - 1) + block.code  # so that tracebacks name the page's lines
        before = sys.modules["__main__"]
        sys.modules["__main__"] = self.main  # where compiled code looks names up
        try:
            with contextlib.redirect_stdout(io.StringIO()) as said:
                exec(compile(lines, str(self.path), "exec"), vars(self.main))
        finally:
            sys.modules["__main__"] = before
        return said.getvalue()

    def rewritten(self) -> str:
        """Return the page with what its blocks print now."""
        said = {block.line: output for block, output in self.run()}

        def renewed(found: re.Match[str]) -> str:
            if found["output"] is None:
                return found[0]
            start, end = (position - found.start() for position in found.span("output"))
            line = 1 + self.text.count("\n", 0, found.start("code"))
            return found[0][:start] + said[line] + found[0][end:]

        return BLOCK.sub(renewed, self.text)


def _commands(code: str) -> list[str]:
    """Return what follows `torchrun` in the commands that run here."""
    lines = code.replace("\\\n", " ").splitlines()
    return [line.removeprefix("torchrun ") for line in lines if line.startswith("torchrun ")]


def _said_by(commands: list[str]) -> str:
    if not commands:
        return ""
    done = subprocess.run(
        [sys.executable, "-m", "tests.distributed.torchrun", *commands],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("[Gloo]"))


def rewrite(pages: list[str]) -> None:
    """Put what the blocks of pages print now into them."""
    for path in [Path(page).resolve() for page in pages]:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            text = Page(path).rewritten()
            os.chdir(ROOT)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    rewrite(sys.argv[1:])
