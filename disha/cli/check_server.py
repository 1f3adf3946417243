"""Check that an adapter acts where it is served.

A few prompts are asked of a server with the API of OpenAI (/v1/completions, with the
log-probabilities of the prompt's tokens, as vLLM gives them), by the adapter's name there and by
the base's. The answers are compared with those of the model here. The exit code is 0 if the adapter
acts there as here, and 1 if it does not.

Examples:
  disha check-server http://localhost:8000 --adapter output/adapter.safetensors
  disha check-server http://localhost:8000 --base model --adapter adapter.safetensors --name support
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from typing import Any

import torch

from disha.cli.dispatcher import DONE, FAILED, Parser
from disha.cli.models import add_model_flags, load_runner
from disha.cli.output import show
from disha.errors import ArgumentError, DishaError

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "def add(a, b):\n    return a + b",
    "Question: What is 12 times 12?\nAnswer: 144",
)
TOKENS = 32
"""Tokens of the longest prompt: fewer than any server takes."""
TOLERANCE = 0.05
"""Largest difference of log-probabilities that 16-bit arithmetic explains, on average."""

LogProbs = list[float]


class Server:
    """A server with the API of OpenAI."""

    def __init__(self, url: str, timeout: float) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout = timeout

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Return what the server answers to a request, or raise in one line."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        try:
            request = urllib.request.Request(self.url + path, data, headers)
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            text = " ".join(error.read().decode(errors="replace").split())[:300]
            raise ArgumentError(f"{self.url}{path} answers {error.code}: {text}") from error
        except (OSError, HTTPException, ValueError) as error:
            raise DishaError(f"{self.url}{path} does not answer as a server: {error}") from error

    def list_models(self) -> dict[str, Any]:
        """Return the names that the server knows -> the base of each, None for a base."""
        listed = self.ask("/v1/models")
        return {model["id"]: model.get("parent") for model in listed["data"]}

    def read(self, name: str, ids: Sequence[int]) -> LogProbs:
        """Return the log-probability of each token of a prompt but the first."""
        body = {"model": name, "prompt": [*ids], "max_tokens": 1, "temperature": 0}
        answer = self.ask("/v1/completions", body | {"prompt_logprobs": 0})
        try:
            listed = answer["choices"][0]["prompt_logprobs"]
            return [
                float(of_token[str(token)]["logprob"])
                for token, of_token in zip(ids[1:], listed[1:], strict=True)
            ]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ArgumentError(
                f"{self.url} gives no log-probabilities of a prompt's tokens (prompt_logprobs), as "
                "vLLM does, so it can't be checked"
            ) from error


def main(words: Sequence[str]) -> int:
    """Check a server."""
    parser = Parser("check-server", __doc__)
    parser.add_argument("url", help="such as http://localhost:8000")
    add_model_flags(parser)
    parser.add_argument("--name", help="the adapter's name at the server; its only one by default")
    parser.add_argument("--timeout", type=float, default=60, help="seconds to wait for an answer")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    flags = parser.parse(words)
    if flags.adapter is None:
        raise ArgumentError("name the adapter with --adapter")
    server = Server(flags.url, flags.timeout)
    name, base_name = find_names(server.list_models(), flags.name)
    runner = load_runner(flags)
    prompts = [runner.tokenizer(text)["input_ids"][:TOKENS] for text in PROMPTS]
    here = {"base": [log_probs_of(runner.model, ids) for ids in prompts]}
    runner.load_adapter(flags)
    here["adapter"] = [log_probs_of(runner.model, ids) for ids in prompts]
    there = {
        "base": [server.read(base_name, ids) for ids in prompts],
        "adapter": [server.read(name, ids) for ids in prompts],
    }
    verdict, fields = judge(here, there)
    show(flags.json, f"{name}: {verdict}", {"name": name, "verdict": verdict, **fields})
    return DONE if fields["acts"] else FAILED


def find_names(models: Mapping[str, Any], name: str | None) -> tuple[str, str]:
    """Return the names at a server of an adapter, its only one by default, and of its base."""
    adapters = [model for model, parent in models.items() if parent is not None]
    if name is None and len(adapters) == 1:
        (name,) = adapters
    if name is None:
        listed = ", ".join(adapters or models)
        raise ArgumentError(f"name the adapter with --name; the server has {listed}")
    if name not in models:
        raise ArgumentError(f"the server has no {name}; it has {', '.join(models)}")
    bases = [model for model, parent in models.items() if parent is None and model != name]
    if models[name] in models:
        bases = [models[name]]
    if not bases:
        raise ArgumentError(f"the server has no base beside {name} to compare with")
    return name, bases[0]


@torch.no_grad()
def log_probs_of(model: Any, ids: Sequence[int]) -> LogProbs:
    """Return the log-probability of each token of a prompt but the first."""
    tokens = torch.tensor([list(ids)], device=model.device)
    chances = model(input_ids=tokens).logits[0, :-1].float().log_softmax(-1)
    return chances.gather(1, tokens[0, 1:, None])[:, 0].tolist()


def judge(
    here: Mapping[str, Sequence[LogProbs]], there: Mapping[str, Sequence[LogProbs]]
) -> tuple[str, dict[str, Any]]:
    """Return what the differences between the answers here and there say, and the differences.

    The bases are compared first: over another base, no answer can be that of the adapter here.
    """
    effect = _distance(here["adapter"], here["base"])
    of_bases = _distance(there["base"], here["base"])
    of_adapters = _distance(there["adapter"], here["adapter"])
    to_base = _distance(there["adapter"], there["base"])
    fields = {
        "acts": False,
        "difference": of_adapters,
        "difference_of_bases": of_bases,
        "difference_to_base_there": to_base,
        "effect_here": effect,
    }
    # What a small adapter does must be larger than what arithmetic does.
    tolerance = min(TOLERANCE, effect / 4)
    if not effect:
        return "can't be told: the adapter changes no answer here", fields
    if of_bases > TOLERANCE:
        return f"another base: its answers differ by {of_bases:.1e} from those here", fields
    if of_adapters <= tolerance:
        fields["acts"] = True
        return f"acts, equal within {of_adapters:.1e}", fields
    if to_base <= tolerance:
        return "does not act: the answers are the base's", fields
    return (
        f"another adapter's: its answers differ by {of_adapters:.1e} from those here, and by "
        f"{to_base:.1e} from the base's"
    ), fields


def _distance(one: Sequence[LogProbs], other: Sequence[LogProbs]) -> float:
    """Return the mean difference of log-probabilities, in nats."""
    differences = torch.cat([torch.tensor(a) - torch.tensor(b) for a, b in zip(one, other)])
    return float(differences.abs().mean())
