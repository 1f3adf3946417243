"""vLLM gives the tokens and log-probabilities of the adapted model: `python -m tests.serving`."""

import json
import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
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

PYTHON = os.environ["SERVING"]
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
NEEDS_TRITON = re.compile(r"triton", re.IGNORECASE)
TOKENS = 12
PROMPTS = ([5, 40, 77, 130], [9, 8, 7, 6, 5, 4, 3], [200])


class Served:
    """A model on disk, with adapters of its own that are exported as LoRA."""

    def __init__(self, folder: Path, family: str, **sizes: object) -> None:
        self.folder, self.adapters = folder, {}
        self.model = write_model(folder / "model", family, **sizes)

    def adapted(self, name: str, r: int, target: str = "layers") -> nn.Module:
        """Return the model with an adapter, which is saved, and converted by the command."""
        base = transformers.AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        model = perturb(disha.inject_adapters(base.eval(), target, r), seed=r, size=0.05)
        file, exported = self.folder / f"{name}.safetensors", self.folder / name
        disha.save_adapter(model, file)
        words = ["convert", file, exported, "--to", "lora", "--experts", "separate"]
        words += ["--base", self.model]
        assert command([*map(str, words)]) == 0
        self.adapters[name] = str(exported)
        return model

    def answers(self, questions: list[tuple[str | None, list[int]]], max_rank: int = 16) -> Any:
        """Return what vLLM answers, or what it says where it fails."""
        asked = {
            "model": str(self.model),
            "adapters": self.adapters,
            "max_lora_rank": max_rank,
            "tokens": TOKENS,
            "questions": [{"adapter": name, "ids": ids} for name, ids in questions],
        }
        file = self.folder / "questions.json"
        file.write_text(json.dumps(asked))
        words = [PYTHON, str(Path(__file__).with_name("in_vllm.py")), str(file)]
        run = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
        if run.returncode:
            return run.stdout + run.stderr
        return json.loads((self.folder / "answers.json").read_text())


@torch.no_grad()
def expected(model: nn.Module, ids: list[int]) -> dict[str, list[Any]]:
    """Return the most probable tokens after a prompt, and their log-probabilities."""
    tokens, chosen = list(ids), []
    for _ in range(TOKENS):
        log_probs = model(torch.tensor([tokens])).logits[0, -1].float().log_softmax(-1)
        tokens.append(int(log_probs.argmax()))
        chosen.append(float(log_probs.max()))
    return {"ids": tokens[len(ids) :], "log_probs": chosen}


def check(found: Any, models: dict[str | None, nn.Module], questions: Any) -> None:
    """Compare the answers of vLLM with those of the models."""
    assert isinstance(found, list), found[-4000:]
    for answer, (name, ids) in zip(found, questions, strict=True):
        wanted = expected(models[name], ids)
        assert answer["ids"] == wanted["ids"]
        assert answer["log_probs"] == pytest.approx(wanted["log_probs"], abs=1e-3)
        difference = torch.tensor(answer["log_probs"]) - torch.tensor(wanted["log_probs"])
        print(
            f"{name}: {TOKENS} tokens equal, log-probabilities within {difference.abs().max():.1e}"
        )


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_several_adapters_at_once(tmp_path, family):
    served = Served(tmp_path, family)
    models = {name: served.adapted(name, r) for name, r in (("eight", 8), ("sixteen", 16))}
    models[None] = transformers.AutoModelForCausalLM.from_pretrained(served.model)
    questions = [(name, ids) for ids in PROMPTS for name in models]
    check(served.answers(questions), models, questions)
    answers = {name: expected(model, PROMPTS[0])["ids"] for name, model in models.items()}
    assert len({tuple(ids) for ids in answers.values()}) == 3  # each adapter has an effect


def test_a_rank_above_sixteen_needs_the_flag(tmp_path):
    served = Served(tmp_path, "Llama")
    models = {"large": served.adapted("large", 24)}
    questions = [("large", PROMPTS[0])]
    assert "rank 24 is greater than max_lora_rank 16" in served.answers(questions)
    check(served.answers(questions, max_rank=32), models, questions)


def test_experts(tmp_path):
    served = Served(tmp_path, "Mixtral")
    models = {"experts": served.adapted("experts", 8)}
    questions = [("experts", PROMPTS[0])]
    found = served.answers(questions)
    if isinstance(found, str) and NEEDS_TRITON.search(found):
        lines = [line for line in found.splitlines() if NEEDS_TRITON.search(line)]
        pytest.skip(f"its experts with a LoRA need triton, which this build lacks: {lines[-1]}")
    check(found, models, questions)


def test_the_server_answers_with_the_adapter(tmp_path):
    served = Served(tmp_path, "Llama")
    model = served.adapted("mine", 8)
    port = free_port()
    # `vllm serve` of this package ends: it asks for the version of a package named vllm.
    words = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(served.model)]
    words += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    words += ["--max-model-len", "64", "--enable-lora", "--max-lora-rank", "16"]
    words += ["--lora-modules", f"mine={served.adapters['mine']}"]
    log = tmp_path / "log.txt"
    with log.open("w") as written:
        server = subprocess.Popen(words, env=ENVIRONMENT, stdout=written, stderr=written)
    try:
        asked = {"model": "mine", "prompt": PROMPTS[0], "max_tokens": TOKENS, "temperature": 0,
                 "logprobs": 1, "ignore_eos": True, "return_token_ids": True}  # fmt: skip
        answer = completed(port, asked, server, log)
    finally:
        server.terminate()
        server.wait(60)
    wanted = expected(model, PROMPTS[0])
    (choice,) = answer["choices"]
    assert answer["model"] == "mine"
    assert choice["token_ids"] == wanted["ids"]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(wanted["log_probs"], abs=1e-3)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def completed(port: int, asked: Any, server: subprocess.Popen[bytes], log: Path) -> Any:
    """Return the answer to a request, as soon as the server is there."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    until = time.monotonic() + 600
    while time.monotonic() < until and server.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            pytest.fail(error.read().decode()[-2000:])
        except OSError:
            time.sleep(1)
    return pytest.fail(f"the server is not there:\n{log.read_text()[-4000:]}")
