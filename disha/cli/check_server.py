"""Check that an adapter acts where it is served.

A few prompts are asked of a server with the API of OpenAI (/v1/completions, with the
log-probabilities of the prompt's tokens, as vLLM gives them), by the adapter's name there and by
the base's. The answers are compared with those of the model here. The exit code is 0 if the adapter
acts there as here, 1 if it does not, and 2 if the server can't be checked.

Examples:
  disha check-server http://localhost:8000 --adapter output/adapter.safetensors
  disha check-server http://localhost:8000 --base model --adapter adapter.safetensors --name support
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError

import torch
from torch import Tensor

from disha.cli.dispatcher import DONE, FAILED, Parser
from disha.cli.models import add_model_flags, load_runner
from disha.cli.output import show
from disha.errors import ArgumentError, DishaError
from disha.files import find_adapter
from disha.finetune.notes import read_notes
from disha.text import printable

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "def add(a, b):\n    return a + b",
    "Question: What is 12 times 12?\nAnswer: 144",
)
TOKENS = 32
"""Tokens of the longest prompt: fewer than any server takes."""
SECONDS = 60
"""How long to wait for an answer."""
TOLERANCE = 0.05
"""Largest difference of log-probabilities that 16-bit arithmetic explains, on average."""


def main(words: Sequence[str]) -> int:
    """Check a server."""
    parser = Parser("check-server", __doc__)
    parser.add_argument("url", help="such as http://localhost:8000")
    add_model_flags(parser)
    parser.add_argument("--name", help="the adapter's name at the server; its only one by default")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    flags = parser.parse(words)
    if flags.adapter is None:
        raise ArgumentError("name the adapter with --adapter")
    flags.adapter = find_adapter(flags.adapter)
    read_notes(flags.adapter)  # raises if it is none
    url = flags.url.rstrip("/").removesuffix("/v1")
    name, base_name = find_names(url, flags.name)
    runner = load_runner(flags)
    prompts = [runner.tokenizer(text)["input_ids"][:TOKENS] for text in PROMPTS]
    base_there = torch.cat([read_log_probs(url, base_name, ids) for ids in prompts])
    adapted_there = torch.cat([read_log_probs(url, name, ids) for ids in prompts])
    base = torch.cat([log_probs_of(runner.model, ids) for ids in prompts])
    runner.load_adapter(flags)
    adapted = torch.cat([log_probs_of(runner.model, ids) for ids in prompts])
    verdict, fields = judge(base, adapted, base_there, adapted_there)
    show(flags.json, f"{name}: {verdict}", {"name": name, "verdict": verdict, **fields})
    return DONE if fields["acts"] else FAILED


def _ask(url: str, body: Mapping[str, Any] | None = None) -> Any:
    """Return what a server answers to a request."""
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            return json.load(response)
    except HTTPError as error:
        said = printable(error.read().decode(errors="replace"), 200)
        raise ArgumentError(f"{url} answers {error.code} {error.reason}: {said}") from error
    except (OSError, HTTPException) as error:  # OSError: of a network, such as a timeout
        reason = error.reason if isinstance(error, URLError) else error
        reason = getattr(reason, "strerror", None) or reason
        raise ArgumentError(
            f"{url} does not answer ({reason}); check that the server runs, and its address, such "
            "as http://localhost:8000"
        ) from error
    except (ValueError, RecursionError) as error:  # of JSON, or of the address
        raise ArgumentError(
            f"{url} gives no JSON ({error}); give the address of a server with the API of OpenAI"
        ) from error


@contextmanager
def _explain_shape(url: str) -> Iterator[None]:
    """Raise `ArgumentError` if the body meets JSON of another shape than vLLM's."""
    try:
        yield
    except DishaError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ArgumentError(
            f"{url} answers with JSON of another shape than vLLM's, so it can't be checked; check "
            "the address"
        ) from error


def find_names(url: str, name: str | None) -> tuple[str, str]:
    """Return the names at a server of an adapter, its only one by default, and of its base."""
    with _explain_shape(url):
        models = _ask(f"{url}/v1/models")["data"]
        parents = {model["id"]: model.get("parent") for model in models}  # None for a base
    adapters = [model for model, parent in parents.items() if parent is not None]
    if name is None and len(adapters) == 1:
        [name] = adapters
    bases = [model for model, parent in parents.items() if parent is None and model != name]
    if name is None or name not in parents or not bases:
        raise ArgumentError(
            f"name an adapter of the server with --name; it has {', '.join(map(str, parents))}"
        )
    return name, bases[0]


def read_log_probs(url: str, name: str, ids: Sequence[int]) -> Tensor:
    """Return the log-probability at a server of each token of a prompt but the first."""
    body = {"model": name, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    with _explain_shape(url):
        listed = _ask(f"{url}/v1/completions", body)["choices"][0].get("prompt_logprobs")
        if listed is None:
            raise ArgumentError(
                f"{url} gives no log-probabilities of a prompt's tokens (prompt_logprobs), as vLLM "
                "does, so it can't be checked"
            )
        pairs = zip(ids[1:], listed[1:], strict=True)
        return torch.tensor([float(of_token[str(token)]["logprob"]) for token, of_token in pairs])


@torch.no_grad()
def log_probs_of(model: Any, ids: Sequence[int]) -> Tensor:
    """Return the log-probability of each token of a prompt but the first."""
    tokens = torch.tensor([list(ids)], device=model.device)
    chances = model(input_ids=tokens).logits[0, :-1].float().log_softmax(-1)
    return chances.gather(1, tokens[0, 1:, None])[:, 0].cpu()


def judge(
    base: Tensor, adapted: Tensor, base_there: Tensor, adapted_there: Tensor
) -> tuple[str, dict[str, Any]]:
    """Return what the differences between the answers here and there say, and the differences.

    The bases are compared first: over another base, no answer can be that of the adapter here.
    """
    effect = _distance(adapted, base)
    of_bases = _distance(base_there, base)
    of_adapters = _distance(adapted_there, adapted)
    to_base = _distance(adapted_there, base_there)
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


def _distance(one: Tensor, other: Tensor) -> float:
    """Return the mean difference of log-probabilities, in nats."""
    return float((one - other).abs().mean())
