"""A server of vLLM answers as the adapted model does, and takes the adapter of each step."""

import json
import os
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
    check_steps,
    check_that_all_differ,
    train_with_vllm,
)

SETTINGS_OF_SERVER = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "64"),
    *("--logprobs-mode", "processed_logprobs"),  # as trl asks for
)
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
        words += SETTINGS_OF_SERVER
        environment = {
            **ENVIRONMENT,
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_SERVER_DEV_MODE": "1",
        }
        self.log = folder / "log.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                words,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
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

    def complete(self, adapter: str | None, ids: list[int]) -> dict[str, Any]:
        """Return the tokens after a prompt, and their log-probabilities."""
        name = str(self.served.model) if adapter is None else adapter
        asked = {"model": name, "prompt": ids, "max_tokens": TOKENS, "temperature": 0}
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


def test_grpo_sends_a_server_the_adapter_of_each_step(server, tmp_path):
    asked = {"model": str(server.served.model), "method": "bone"}
    asked["server"] = f"http://127.0.0.1:{server.port}"
    check_steps(train_with_vllm(tmp_path / "trained", **asked))
    said = train_with_vllm(tmp_path / "too large", **asked, r=32)
    wanted = "with --enable-lora --max-lora-rank 32 --max-loras 2"
    assert f"a LoRA of rank 32; start vLLM at {asked['server']} {wanted}" in said
