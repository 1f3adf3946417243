"""`python -m tests.matrix`: run tests with the oldest and the newest Python and dependencies.

Each leg has an environment of its own, which `uv` makes: 20 GB of disk in all. `uv` looks for the
Python of a leg on this machine, and else downloads it. The oldest releases are the lower bounds of
`pyproject.toml`.
"""

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from uv import find_uv_bin

ROOT = Path(__file__).parent.parent
OLDEST, NEWEST = "lowest-direct", "highest"


@dataclass(frozen=True)
class Leg:
    """A Python, which releases of the dependencies, and the tests that run with them."""

    python: str
    releases: str
    tests: tuple[str, ...] = ("--core",)
    extra: str = ""
    for_tests: tuple[str, ...] = ("pytest>=8", "hypothesis>=6.100", "numpy>=1.26")


COMMANDS = Leg(
    "3.11",
    OLDEST,
    tests=("tests/cli", "tests/finetune", "--ignore=tests/finetune/test_demo.py"),
    extra="[finetune]",
    for_tests=(
        "pytest>=8",
        "hypothesis>=6.100",
        "bitsandbytes",
        "diffusers",
        "peft",
        "tensorboard",
    ),
)
LEGS = {
    "oldest": Leg("3.11", OLDEST),
    "newest": Leg("3.14", NEWEST),
    "oldest-commands": COMMANDS,
    "newest-commands": replace(COMMANDS, python="3.14", releases=NEWEST),
}


def passes(leg: Leg, folder: Path, arguments: list[str]) -> bool:
    """Make the environment of a leg, and run its tests."""
    uv, python = find_uv_bin(), str(folder / "bin" / "python")
    # Compiled as pip does, so that no test sees what a compiler warns of in another library.
    install = [uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", python]
    subprocess.run([uv, "venv", "--quiet", "--clear", "--python", leg.python, folder], check=True)
    ours = ["--resolution", leg.releases, "--editable", f"{ROOT}{leg.extra}"]
    subprocess.run([*install, *ours], check=True)
    subprocess.run([*install, *leg.for_tests], check=True)
    command = [python, "-m", "pytest", *leg.tests, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment).returncode == 0


def main() -> int:
    """Run every leg, or one; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-matrix")
    parser.add_argument("--only", choices=LEGS, help="one leg")
    options, arguments = parser.parse_known_args()
    failed = []
    for name in [options.only] if options.only else LEGS:
        print(f"{name}: Python {LEGS[name].python}", flush=True)
        if not passes(LEGS[name], options.folder.resolve() / name, arguments):
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
