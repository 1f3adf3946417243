"""The scripts of docs/examples, each at reduced size in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.pages import ROOT

FOLDER = ROOT / "docs" / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")

RUNS = {
    "custom_mlp.py": (0.5, ["--steps", "60"]),
    "vit.py": (0.98, ["--steps", "16", "--depth", "1"]),
    "gpt2_from_transformers.py": (0.9, ["--steps", "15", "--layers", "2"]),
    "two_adapters_one_batch.py": (0.5, ["--steps", "60"]),
    "fsdp2.py": (0.5, ["--steps", "40", "--width", "32"]),
}
"""Script -> what is left of the loss at most, and its flags here."""


def test_every_script_is_run_and_listed():
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert sorted(RUNS) == sorted(path.name for path in FOLDER.glob("*.py"))
    assert [name for name in RUNS if f" docs/examples/{name}`" not in listed] == []


@pytest.mark.parametrize("name", RUNS)
def test_it_trains_saves_and_loads_elsewhere(name, tmp_path):
    least_fall, flags = RUNS[name]
    launcher = TORCHRUN if name == "fsdp2.py" else ()
    done = subprocess.run(
        [sys.executable, *launcher, str(FOLDER / name), *flags],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    losses = re.findall(r"^loss: ([\d.]+) before, ([\d.]+) after", done.stdout, re.MULTILINE)
    assert losses, done.stdout
    for before, after in losses:
        assert float(after) <= least_fall * float(before), done.stdout
    difference = re.search(r"^reloaded: outputs differ by at most (\S+)$", done.stdout, re.M)
    assert float(difference[1]) <= 1e-4, done.stdout
