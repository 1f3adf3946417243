"""What the checks of serving share: a model on disk, its adapters, and the answers they give."""

import contextlib
import io
import json
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import disha
from disha.cli import main as command
from tests.conftest import perturb
from tests.finetune.tiny_models import write_model

ROOT = Path(__file__).parent.parent.parent
PYTHON = Path(os.environ["SERVING"])
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
TOKENS = 12
PROMPTS = ([5, 40, 77, 130], [9, 8, 7, 6, 5, 4, 3], [200])

Question = tuple[str | None, list[int]]
"""The name of an adapter, or None for the base, and the tokens of a prompt."""


class Served:
    """A model on disk, with adapters that are exported as LoRA."""

    def __init__(self, folder: Path, family: str) -> None:
        self.folder = folder
        self.model = write_model(folder / "model", family)
        self.adapters: dict[str, str] = {}
        self.commands: dict[str, list[str]] = {}
        """The words that `disha convert` prints to serve each adapter."""

    def load(self) -> nn.Module:
        """Return the base."""
        base = transformers.AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        return base.eval()

    def adapt(self, name: str, r: int, target: str = "layers") -> nn.Module:
        """Return the model with an adapter, which is saved, and converted by the command."""
        model = perturb(disha.inject_adapters(self.load(), target, r), seed=r, size=0.05)
        file, exported = self.folder / f"{name}.safetensors", self.folder / name
        disha.save_adapter(model, file)
        words = ["convert", file, exported, "--to", "lora", "--experts", "separate"]
        words += ["--base", self.model]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert command([*map(str, words)]) == 0
        self.adapters[name] = str(exported)
        self.commands[name] = shlex.split(printed.getvalue().partition("to serve it: ")[2])
        return model

    def max_rank(self, name: str) -> int:
        """Return the largest rank in the printed words."""
        words = self.commands[name]
        return int(words[words.index("--max-lora-rank") + 1])

    def answer(
        self, questions: Sequence[Question], max_rank: int = 16, places: int | None = None
    ) -> Any:
        """Return what vLLM answers, or what it says where it fails.

        Without a number of places for adapters, one more than there are adapters is given.
        """
        asked = {
            "model": str(self.model),
            "adapters": self.adapters,
            "max_lora_rank": max_rank,
            "places": len(self.adapters) + 1 if places is None else places,
            "tokens": TOKENS,
            "questions": [{"adapter": name, "ids": ids} for name, ids in questions],
        }
        file = self.folder / "questions.json"
        file.write_text(json.dumps(asked))
        words = [str(PYTHON), str(Path(__file__).with_name("in_vllm.py")), str(file)]
        # All in one process: its errors are whole then.
        environment = {**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        run = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=900)
        if run.returncode:
            return run.stdout + run.stderr
        return json.loads((self.folder / "answers.json").read_text())


def train_with_vllm(folder: Path, **asked: Any) -> Any:
    """Train three steps of GRPO, and return what `in_trl.py` has found, or says where it fails."""
    folder.mkdir()
    file = folder / "asked.json"
    file.write_text(json.dumps({"r": 8, "sent": "adapter", "server": None} | asked))
    words = [str(PYTHON), str(Path(__file__).with_name("in_trl.py")), str(file)]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=900)
    if run.returncode:
        return run.stdout + run.stderr
    return json.loads((folder / "found.json").read_text())


def check_steps(found: Any) -> None:
    """Check that vLLM answers in each step as the trained model does."""
    assert isinstance(found, dict), found[-4000:]
    print(found)
    assert len(found["steps"]) == 3
    assert all(step["equal"] for step in found["steps"])
    assert max(step["error"] for step in found["steps"]) < 1e-5
    assert found["steps"][0]["effect"] == 0  # a new adapter is zero
    assert found["steps"][-1]["effect"] > 1e-2
    assert found["base_is_the_same"]


@torch.no_grad()
def expect(model: nn.Module, ids: list[int]) -> dict[str, list[Any]]:
    """Return the most probable tokens after a prompt, and their log-probabilities."""
    tokens, chosen = list(ids), []
    for _ in range(TOKENS):
        log_probs = model(torch.tensor([tokens])).logits[0, -1].float().log_softmax(-1)
        tokens.append(int(log_probs.argmax()))
        chosen.append(float(log_probs.max()))
    return {"ids": tokens[len(ids) :], "log_probs": chosen}


def check_answers(
    found: Any, models: Mapping[str | None, nn.Module], questions: Sequence[Question]
) -> None:
    """Compare the answers of vLLM with those of the models."""
    assert isinstance(found, list), found[-4000:]
    for answer, (name, ids) in zip(found, questions, strict=True):
        wanted = expect(models[name], ids)
        assert answer["ids"] == wanted["ids"]
        assert answer["log_probs"] == pytest.approx(wanted["log_probs"], abs=1e-3)
        difference = torch.tensor(answer["log_probs"]) - torch.tensor(wanted["log_probs"])
        largest = float(difference.abs().max())
        print(f"{name}: {TOKENS} tokens equal, log-probabilities within {largest:.1e}")


def check_that_all_differ(models: Mapping[str | None, nn.Module]) -> None:
    """Check that each adapter has an effect on an answer."""
    answers = {tuple(expect(model, PROMPTS[0])["ids"]) for model in models.values()}
    assert len(answers) == len(models)
