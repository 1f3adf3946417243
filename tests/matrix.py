"""`python -m tests.matrix`: run the core's tests on the oldest and newest supported dependencies.

Each leg is a Python with releases of the three dependencies, in an environment of its own: 11 GB of
disk in all. A Python that is not installed is reported and left out. If none is, that is an error.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent

FOR_TESTS = ("pytest>=8", "hypothesis>=6.100", "numpy>=1.26")


@dataclass(frozen=True)
class Leg:
    """A Python, and the releases of the dependencies that are tried with it."""

    name: str
    python: str
    dependencies: tuple[str, ...]


LEGS = (
    Leg("oldest", "3.10", ("torch>=2.11,<2.12", "safetensors>=0.4.3,<0.4.4", "einops>=0.7,<0.8")),
    Leg("newest", "3.13", ("torch", "safetensors", "einops")),
)


def interpreter(version: str) -> str | None:
    """Return the command of a Python of this version, if there is one that runs."""
    for candidate in _candidates(version):
        code = "import sys, venv; print('{}.{}'.format(*sys.version_info))"
        done = subprocess.run([candidate, "-c", code], capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip() == version:
            return candidate
    return None


def _candidates(version: str) -> Iterator[str]:
    found = shutil.which(f"python{version}")
    if found:
        yield found  # of pyenv, it may be one that runs only where this version is chosen
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    yield from map(str, sorted(versions.glob(f"{version}.*/bin/python"), reverse=True))


def prepare(leg: Leg, command: str, folder: Path) -> Path:
    """Make the environment of a leg, if it is not there, and return its Python."""
    python = folder / leg.name / "bin" / "python"
    ready = folder / leg.name / ".ready"
    wanted = "\n".join((*leg.dependencies, *FOR_TESTS))
    if not ready.exists() or ready.read_text(encoding="utf-8") != wanted:
        subprocess.run([command, "-m", "venv", "--clear", str(folder / leg.name)], check=True)
        install = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-q"]
        subprocess.run([*install, *leg.dependencies, *FOR_TESTS], check=True)
        subprocess.run([*install, "--no-deps", "-e", str(ROOT)], check=True)
        ready.write_text(wanted, encoding="utf-8")
    return python


def passes(python: Path, arguments: list[str]) -> bool:
    """Run the core's tests with a Python."""
    command = [str(python), "-m", "pytest", "--core", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0


def main() -> int:
    """Run every leg and say how each went; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-matrix")
    parser.add_argument("--only", choices=[leg.name for leg in LEGS], help="one leg")
    options, arguments = parser.parse_known_args()
    outcome: dict[str, str] = {}
    for leg in LEGS:
        if options.only in (None, leg.name):
            outcome[leg.name] = run(leg, options.folder.resolve(), arguments)
    for name, result in outcome.items():
        print(f"{name}: {result}")
    failed = "failed" in outcome.values() or "passed" not in outcome.values()
    return 1 if failed else 0


def run(leg: Leg, folder: Path, arguments: list[str]) -> str:
    """Run one leg, and say how it went."""
    command = interpreter(leg.python)
    if command is None:
        return f"left out: no Python {leg.python} here; install it as python{leg.python}"
    print(f"{leg.name}: Python {leg.python}, {', '.join(leg.dependencies)}", flush=True)
    return "passed" if passes(prepare(leg, command, folder), arguments) else "failed"


if __name__ == "__main__":
    sys.exit(main())
