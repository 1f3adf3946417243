"""The first steps of a new user, and the seconds that each takes.

    make build
    python -m tests.packaging.newcomer

The steps start from the wheel in `dist/`: make an environment, install, adapt a model, train it,
save the adapter; then, in another process and folder, load it, export it as a LoRA and merge it;
then adapt a mixture of experts, and check that adapter. What the user writes is in
`docs/examples/newcomer`: `train.py`, `serve.py` and `experts.py`, beside a model.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "docs" / "examples" / "newcomer"
SCRIPTS = ("train.py", "serve.py", "experts.py")
SECTIONS = Path(__file__).with_name("sections.py")
ADAPTER = "ring.safetensors"


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel and what it depends on.

    Attributes:
        python: its interpreter.
        seconds: step -> how long it took.
    """

    python: Path
    seconds: dict[str, float]


@dataclass(frozen=True)
class Walked:
    """What came of the scripts.

    Attributes:
        seconds: step -> how long it took.
        trained: the loss of the model that was trained, and its logits.
        served: the same of the model that loaded and merged the adapter elsewhere.
        experts: the same of the model with experts.
    """

    seconds: dict[str, float]
    trained: tuple[float, list[list[float]]]
    served: tuple[float, list[list[float]]]
    experts: tuple[float, list[list[float]]]


def install(wheel: Path, folder: Path) -> Installed:
    """Install a wheel, as anybody would, into a new environment in a folder."""
    started = time.perf_counter()
    run(sys.executable, "-m", "venv", str(folder))
    python = folder / "bin" / "python"
    made = time.perf_counter()
    run(str(python), "-m", "pip", "install", "--disable-pip-version-check", "-q", str(wheel))
    return Installed(
        python, {"make an environment": made - started, "install": time.perf_counter() - made}
    )


def walk(python: Path, folder: Path) -> Walked:
    """Run the scripts, each in a folder of its own that holds the adapter and no checkout."""
    seconds: dict[str, float] = {}
    results = []
    for script in SCRIPTS:
        place = folder / Path(script).stem
        shutil.copytree(EXAMPLE, place, ignore=shutil.ignore_patterns("__pycache__"))
        if script == "serve.py":
            shutil.move(folder / "train" / ADAPTER, place)
        run(str(python), str(SECTIONS), script, "results.json", cwd=place)
        found = json.loads((place / "results.json").read_text(encoding="utf-8"))
        results.append((found["loss"], found["logits"]))
        for part, value in found["seconds"].items():
            seconds[f"{script}: {part}"] = value
    return Walked(seconds, *results)


def run(*command: str, cwd: Path | None = None) -> str:
    """Run a command as if there were no checkout, and return what it prints."""
    done = subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def environment() -> dict[str, str]:
    """Return the environment variables without those that lead Python to other packages."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def lines_of_code() -> int:
    """Return how many lines a newcomer writes, blank ones and comments left out."""
    lines = [
        line.strip()
        for script in SCRIPTS
        for line in (EXAMPLE / script).read_text(encoding="utf-8").splitlines()
    ]
    return sum(bool(line) and not line.startswith("#") for line in lines)


def main() -> None:
    """Take the steps with the wheel in `dist/`, and print how long each takes."""
    (wheel,) = (ROOT / "dist").glob("*.whl")
    with tempfile.TemporaryDirectory() as folder:
        installed = install(wheel, Path(folder, "environment"))
        walked = walk(installed.python, Path(folder))
    for step, value in {**installed.seconds, **walked.seconds}.items():
        print(f"{value:8.2f} s  {step}")
    print(f"{lines_of_code()} lines of code; loss {walked.trained[0]:.3f}, ", end="")
    print(f"loaded elsewhere and merged {walked.served[0]:.3f}")


if __name__ == "__main__":
    main()
