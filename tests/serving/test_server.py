"""A server of vLLM answers as the adapted model does, and takes the adapter of each step."""

import json
import os
import random
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import disha
from disha.cli import main as command
from tests.serving.served import (
    ENVIRONMENT,
    PROMPTS,
    PYTHON,
    TOKENS,
    Served,
    check_answers,
    check_that_all_differ,
)

SMALL = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "64"]
PLACES = 5
"""For the two adapters, for one that is zero, for that of a trainer, and one that stays empty."""


class Server:
    """A server that is started with the words that `disha convert` prints."""

    def __init__(self, folder: Path) -> None:
        self.served = Served(folder, "Llama")
        self.models = {name: self.served.adapt(name, r) for name, r in (("a", 8), ("b", 16))}
        self.models[None] = self.served.load()
        printed, other = self.served.commands["b"], self.served.commands["a"]
        assert printed[:2] == ["vllm", "serve"]
        assert printed[-2] == other[-2] == "--lora-modules"
        self.port = find_port()
        words = [str(PYTHON.with_name("vllm")), *printed[1:], other[-1]]
        words += ["--host", "127.0.0.1", "--port", str(self.port), "--max-loras", str(PLACES)]
        environment = {**ENVIRONMENT, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
        self.log = folder / "log.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*words, *SMALL], env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        """Wait until the server answers."""
        until = time.monotonic() + 900
        while time.monotonic() < until and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=60):
                    return
            except OSError:
                time.sleep(1)
        pytest.fail(f"the server is not there:\n{self.log.read_text()[-4000:]}")

    def stop(self) -> None:
        """Stop the server with the processes that it has started."""
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def post(self, path: str, body: dict[str, Any]) -> bytes:
        """Return what the server answers to a request."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            return pytest.fail(error.read().decode()[-2000:])

    def complete(
        self, adapter: str | None, ids: list[int], tokens: int = TOKENS, temperature: float = 0
    ) -> dict[str, Any]:
        """Return the tokens after a prompt, and their log-probabilities."""
        name = str(self.served.model) if adapter is None else adapter
        asked = {"model": name, "prompt": ids, "max_tokens": tokens, "temperature": temperature}
        asked |= {"logprobs": 1, "ignore_eos": True, "return_token_ids": True}
        answer = json.loads(self.post("/v1/completions", asked))
        assert answer["model"] == name
        (choice,) = answer["choices"]
        return {"ids": choice["token_ids"], "log_probs": choice["logprobs"]["token_logprobs"]}


def find_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    started = Server(tmp_path_factory.mktemp("server"))
    try:
        started.wait()
        yield started
    finally:
        started.stop()


def test_two_adapters_and_the_base_answer_at_once(server):
    questions = [(name, ids) for ids in PROMPTS for name in server.models]
    with ThreadPoolExecutor(len(questions)) as pool:
        found = list(pool.map(lambda question: server.complete(*question), questions))
    check_answers(found, server.models, questions)
    check_that_all_differ(server.models)


def test_check_server_says_what_answers(server, tmp_path, capsys):
    zero = disha.inject_adapters(server.served.load(), "layers", 8)
    disha.interop.lora.export(zero, tmp_path / "zero")
    server.post("/v1/load_lora_adapter", {"lora_name": "zero", "lora_path": str(tmp_path / "zero")})
    other = server.served.load()
    with torch.no_grad():
        other.lm_head.weight.neg_()
    other.save_pretrained(tmp_path / "other")
    transformers.AutoTokenizer.from_pretrained(server.served.model).save_pretrained(
        tmp_path / "other"
    )
    disha.save_adapter(
        disha.inject_adapters(other, "layers", 8, init="kaiming"), tmp_path / "b.safetensors"
    )
    mine = server.served.folder / "a.safetensors"
    for base, adapter, name, code, verdict in (
        (server.served.model, mine, "a", 0, "acts, equal within"),
        (server.served.model, mine, "zero", 1, "does not act: the answers are the base's"),
        (server.served.model, mine, "b", 1, "another adapter's"),
        (tmp_path / "other", tmp_path / "b.safetensors", "a", 1, "another base"),
    ):
        words = ["check-server", f"http://127.0.0.1:{server.port}", "--base", base]
        capsys.readouterr()
        found = command([*map(str, words), "--adapter", str(adapter), "--name", name])
        out, err = capsys.readouterr()
        with capsys.disabled():
            print(out, err)
        assert (found, out.partition(": ")[2].startswith(verdict)) == (code, True), out + err


@torch.no_grad()
def log_probs_of(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Return the log-probability of each token of an answer."""
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def test_each_rollout_has_the_adapter_of_its_step(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from disha.integrations.trl import GRPOTrainer

    tokenizer = transformers.AutoTokenizer.from_pretrained(server.served.model, padding_side="left")
    base, draw = server.models[None], random.Random(0)
    model = disha.inject_adapters(server.served.load(), "layers", 8)
    errors, effects = [], []

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        folder = tmp_path / "exported"
        disha.interop.lora.export(trainer.model, folder)
        asked = {"lora_name": "trained", "lora_path": str(folder), "load_inplace": True}
        server.post("/v1/load_lora_adapter", asked)
        prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        answers = [server.complete("trained", ids, 6, temperature=1) for ids in prompt_ids]
        for ids, answer in zip(prompt_ids, answers, strict=True):
            found = torch.tensor(answer["log_probs"])
            errors.append(float((found - log_probs_of(model, ids, answer["ids"])).abs().max()))
            effects.append(float((found - log_probs_of(base, ids, answer["ids"])).abs().max()))
        ids = [answer["ids"] for answer in answers]
        return {"prompt_ids": prompt_ids, "completion_ids": ids, "logprobs": None}

    settings = {
        "per_device_train_batch_size": 2,
        "num_generations": 2,
        "max_completion_length": 6,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
    }
    trainer = GRPOTrainer(
        model,
        lambda completions, **columns: [draw.random() for _ in completions],
        args=trl.GRPOConfig(str(tmp_path), **settings),
        train_dataset=Dataset.from_list([{"prompt": "say two"}] * 6),
        processing_class=tokenizer,
        rollout_func=rollout,
    )
    trainer.train()
    print(f"errors {errors}, effects of the adapter {effects}")
    assert len(errors) == 6
    assert max(errors) < 1e-3
    assert max(effects[:2]) < 1e-3  # a new adapter is zero
    assert max(effects[-2:]) > 1e-2
