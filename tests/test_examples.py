"""The scripts of docs/examples, each at reduced size in a process of its own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.finetune import tiny_gguf
from tests.processes import ROOT, TORCHRUN, ended, started

FOLDER = ROOT / "docs" / "examples"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py"))
SECONDS = 300
"""Many times what a script takes: most of it is spent on importing torch."""

LONGEST = 85
"""Lines of a script that is read in one go."""


@dataclass(frozen=True)
class Reduced:
    """How a script is run here."""

    flags: tuple[str, ...]
    says: tuple[str, ...]
    launcher: tuple[str, ...] = ()
    least_fall: float = 0.5
    """What is left of the loss, at most."""
    largest_difference: float = 0.0


RUNS = {
    "custom_mlp.py": Reduced(
        ("--steps", "60"), (r"upside down, after: [6-9]\d\.\d% read right", "upright, adapter off")
    ),
    "vit.py": Reduced(
        ("--steps", "16", "--depth", "1"), ("bytes, head included",), least_fall=0.98
    ),
    "llama_from_gguf.py": Reduced(
        ("--steps", "10"), (r"for llama\.cpp: 14 layers, relative error 0\n", "lighthouse of")
    ),
    "gpt2_from_transformers.py": Reduced(
        ("--steps", "15", "--layers", "2"),
        (r"for PEFT: 8 layers, relative error 0\n",),
        least_fall=0.9,
    ),
    "two_adapters_one_batch.py": Reduced(
        ("--steps", "60"),
        tuple(rf"{name}: [6-9]\d\.\d% read" for name in ("no adapter", "upside-down", "mirrored")),
        largest_difference=1e-4,  # products of other sizes are summed in another order
    ),
    "fsdp2.py": Reduced(("--steps", "40", "--width", "32"), ("2 processes",), TORCHRUN),
}


def test_every_script_is_run_and_listed():
    assert sorted(RUNS) == SCRIPTS
    listed = (FOLDER / "README.md").read_text()
    for name in SCRIPTS:
        launcher = "torchrun --nproc-per-node 2" if RUNS[name].launcher else "python"
        assert f"`{launcher} docs/examples/{name}`" in listed
        assert f"    {launcher} docs/examples/{name}\n" in (FOLDER / name).read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_short(name):
    assert len((FOLDER / name).read_text().splitlines()) <= LONGEST


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_trains_saves_and_loads_elsewhere(name, tmp_path):
    run = RUNS[name]
    flags = run.flags
    if name == "llama_from_gguf.py":
        state = tiny_gguf.random_state(tied=True)
        flags += ("--model", str(tiny_gguf.write_gguf(tmp_path / "tiny.gguf", state)))
    output = _output_of((*run.launcher, str(FOLDER / name), *flags), tmp_path)
    losses = re.findall(r"^loss: ([\d.]+) before, ([\d.]+) after", output, re.MULTILINE)
    assert losses, output
    for before, after in losses:
        assert float(after) <= run.least_fall * float(before), output
    difference = re.search(r"^reloaded: outputs differ by at most (\S+)$", output, re.MULTILINE)
    assert difference, output
    assert float(difference[1]) <= run.largest_difference, output
    for said in run.says:
        assert re.search(said, output), f"{said!r} is not in:\n{output}"
    if name != "two_adapters_one_batch.py":
        size = re.search(r"^adapter file: ([\d,]+) bytes", output, re.MULTILINE)
        assert size, output
        assert int(size[1].replace(",", "")) > 1000, output


def _output_of(arguments: tuple[str, ...], folder: Path) -> str:
    """Run Python in an empty folder; return what it prints, and fail where it does."""
    done = ended(started(arguments, folder), SECONDS)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout
