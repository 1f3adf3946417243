"""`python -m tests.matrix`: run the core's tests on the oldest and newest supported dependencies.

Each leg is a Python with releases of the three dependencies, in an environment of its own: 11 GB of
disk in all.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOR_TESTS = ("pytest>=8", "hypothesis>=6.100", "numpy>=1.26")
LEGS = {
    "oldest": ("python3.10", "torch>=2.11,<2.12", "safetensors>=0.4.3,<0.4.4", "einops>=0.7,<0.8"),
    "newest": ("python3.13", "torch", "safetensors", "einops"),
}
"""Name -> the Python, and the releases of the dependencies."""


def passes(leg: str, folder: Path, arguments: list[str]) -> bool:
    """Make the environment of a leg, and run the core's tests in it."""
    interpreter, *dependencies = LEGS[leg]
    print(f"{leg}: {interpreter}, {', '.join(dependencies)}", flush=True)
    python = str(folder / leg / "bin" / "python")
    install = [python, "-m", "pip", "install", "--disable-pip-version-check", "-q"]
    subprocess.run([interpreter, "-m", "venv", str(folder / leg)], check=True)
    subprocess.run([*install, *dependencies, *FOR_TESTS], check=True)
    subprocess.run([*install, "--no-deps", "-e", str(ROOT)], check=True)
    command = [python, "-m", "pytest", "--core", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment).returncode == 0


def main() -> int:
    """Run every leg, or one; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-matrix")
    parser.add_argument("--only", choices=LEGS, help="one leg")
    options, arguments = parser.parse_known_args()
    legs = [options.only] if options.only else list(LEGS)
    failed = [leg for leg in legs if not passes(leg, options.folder.resolve(), arguments)]
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
