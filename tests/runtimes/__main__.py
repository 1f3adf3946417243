"""`python -m tests.runtimes`: show exported adapters to the code of vLLM and SGLang.

The first call downloads the newest sources of both, about 90 MB, without what they depend on. They
are never installed, and no kernel runs: only the code that reads and checks a LoRA.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

BUILD_TOOLS = ("setuptools>=77,<83", "setuptools-scm>=8", "setuptools-rust>=1.9", "packaging")
"""What vLLM's sources need to tell their own name, without which pip does not hand them over."""


def main() -> int:
    """Download the sources that are not there, and run the tests; return their exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.runtimes", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / ".runtimes")
    folder = parser.parse_args().folder.resolve()
    if not (folder / "vllm").exists():
        _extract(_vllm(folder), folder, "vllm")
    if not (folder / "sglang").exists():
        _extract(_sglang(folder), folder, "sglang")
    print(*sorted(one.name for one in folder.iterdir() if one.is_file()), sep="\n", flush=True)
    tests = [sys.executable, "-m", "pytest", "tests/runtimes"]
    return subprocess.run(tests, cwd=ROOT, env={**os.environ, "RUNTIMES": str(folder)}).returncode


def _sglang(folder: Path) -> Path:
    _pip(sys.executable, "download", "--no-deps", "--only-binary", "sglang", "sglang", to=folder)
    return next(folder.glob("sglang-*.whl"))


def _vllm(folder: Path) -> Path:
    """Download the sources; a wheel would be half a gigabyte of kernels."""
    environment = folder / ".venv"
    venv.create(environment, with_pip=True, clear=True)
    python = str(environment / "bin" / "python")
    _pip(python, "install", *BUILD_TOOLS)
    # The sources import torch to tell their name: let them find the one that is installed here.
    home = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    installed = [one for one in sys.path if one.endswith("site-packages")]
    Path(home, "outer.pth").write_text("\n".join(installed))
    version = _newest(python, "vllm")
    flags = {"VLLM_TARGET_DEVICE": "empty", "VLLM_VERSION_OVERRIDE": version}
    source = ("--no-deps", "--no-build-isolation", "--no-binary", "vllm", f"vllm=={version}")
    _pip(python, "download", *source, to=folder, flags=flags)
    return next(folder.glob("vllm-*.tar.gz"))


def _newest(python: str, package: str) -> str:
    """Return the newest version of a package: pip would try all versions, one after another."""
    found = subprocess.run(
        [python, "-m", "pip", "index", "versions", package],
        capture_output=True,
        text=True,
        check=True,
    )
    return found.stdout.split("(")[1].split(")")[0]


def _pip(
    python: str, *arguments: str, to: Path | None = None, flags: dict[str, str] | None = None
) -> None:
    command = [python, "-m", "pip", *arguments, "-q", "--disable-pip-version-check"]
    folder = [] if to is None else ["--dest", str(to)]
    subprocess.run([*command, *folder], env={**os.environ, **(flags or {})}, check=True)


def _extract(archive: Path, folder: Path, package: str) -> None:
    """Put the Python files of a package into the folder."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            names = [one for one in wheel.namelist() if one.endswith((".py", "METADATA"))]
            wheel.extractall(folder, names)
        return
    with tarfile.open(archive) as sources:
        for member in sources.getmembers():
            rest = member.name.partition("/")[2]
            if rest.startswith(f"{package}/") and rest.endswith(".py"):
                member.name = rest
                sources.extract(member, folder, filter="data")


if __name__ == "__main__":
    sys.exit(main())
