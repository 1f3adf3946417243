"""`python -m docs.neighbours`: which tools can share an environment with disha.

For every Python, `uv` solves the requirements of the newest release of a tool together with those
of disha. It installs nothing. The table goes into docs/compatibility.md.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from uv import find_uv_bin

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
TOOLS = {"vllm": "vLLM", "sglang": "SGLang", "unsloth": "unsloth", "axolotl": "axolotl"}
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
EXTRAS = ("", "[finetune]", "[finetune,quant]")


def solved(python: str, *requirements: str) -> dict[str, str]:
    """Return the releases of all packages that fit, or {} if none do."""
    options = ("--quiet", "--no-header", "--no-annotate", "--python-version", python)
    command = [find_uv_bin(), "pip", "compile", *options, "-"]
    done = subprocess.run(command, input="\n".join(requirements), capture_output=True, text=True)
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return dict(re.findall(r"^([\w.-]+)==([\w.+]+)", line)[0] for line in lines if "==" in line)


def row(tool: str) -> str:
    """Return the line of a tool: with each extra, the Pythons for which something fits."""
    newest = max((solved(python, tool).get(tool, "") for python in PYTHONS), key=numbers)
    cells, found = [f"{TOOLS[tool]} {newest}"], {}
    for extra in EXTRAS:
        ours = f"disha-torch{extra} @ {ROOT.as_uri()}"
        fits = {python: solved(python, f"{tool}=={newest}", ours) for python in PYTHONS}
        pythons = [python for python, packages in fits.items() if packages]
        cells.append(", ".join(pythons) or "none")
        found = fits[pythons[-1]] if pythons else {}
    shared = [f"{name} {found.get(name, 'none')}" for name in ("torch", "transformers", "trl")]
    return f"| {' | '.join([*cells, ', '.join(shared)])} |"


def numbers(version: str) -> list[int]:
    """Return the parts of a version, which compare as numbers."""
    return [int(part) for part in re.findall(r"\d+", version)]


def main() -> int:
    """Write the table into the page."""
    head = ["tool", *(extra or "no extra" for extra in EXTRAS), "with, on the newest of these"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|", *map(row, TOOLS)]
    print("\n".join(lines))
    page = PAGE.read_text(encoding="utf-8")
    table = re.compile(r"^\| tool \|.*?(?=^\n)", re.DOTALL | re.MULTILINE)
    PAGE.write_text(table.sub("\n".join(lines) + "\n", page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
