"""The scripts of docs/examples, each at reduced size."""

import re
import runpy
import sys

import pytest

from tests.pages import ROOT

FOLDER = ROOT / "docs" / "examples"
RUNS = {
    "custom_mlp.py": (0.5, ["--steps", "60"]),
    "vit.py": (0.98, ["--steps", "16", "--depth", "1"]),
    "gpt2_from_transformers.py": (0.9, ["--steps", "15", "--layers", "2"]),
    "two_adapters_one_batch.py": (0.5, ["--steps", "60"]),
}
"""Script -> what is left of the loss at most, and its flags here."""

MEAN_REWARD = r"mean reward: (\S+) in the first 5 steps, (\S+) in the last 5"


@pytest.mark.parametrize("name", RUNS)
def test_it_trains_saves_and_loads_elsewhere(name, tmp_path, monkeypatch, capsys):
    least_fall, flags = RUNS[name]
    monkeypatch.chdir(tmp_path)
    output = run_script(name, flags, monkeypatch, capsys)
    losses = re.findall(r"^loss: ([\d.]+) before, ([\d.]+) after", output, re.MULTILINE)
    assert losses, output
    assert all(float(after) <= least_fall * float(before) for before, after in losses), output
    difference = re.search(r"^reloaded: outputs differ by at most (\S+)$", output, re.MULTILINE)
    assert float(difference[1]) <= 1e-4, output


def test_the_mean_reward_rises(tmp_path, monkeypatch, capsys):
    """Without vLLM; `python -m tests.serving -k reward` runs it with vLLM."""
    monkeypatch.chdir(tmp_path)
    output = run_script("grpo.py", ["--no-vllm", "--steps", "20"], monkeypatch, capsys)
    first, last = re.search(MEAN_REWARD, output).groups()
    assert float(last) > float(first) + 0.2, output
    assert (tmp_path / "grpo-output" / "adapter.safetensors").exists()


def run_script(name, flags, monkeypatch, capsys):
    """Run a script in this process, and return what it prints."""
    monkeypatch.setattr(sys, "argv", [name, *flags])
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    return capsys.readouterr().out


def test_every_script_is_run_and_listed():
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    scripts = sorted([*RUNS, "grpo.py"])
    assert scripts == sorted(path.name for path in FOLDER.glob("*.py"))
    assert [name for name in scripts if f" docs/examples/{name}`" not in listed] == []
