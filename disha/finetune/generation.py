"""Continuing texts with a language model, token by token.

Our own decoder keeps the keys and values of what it has seen; any other model is run over the whole
text for every token. The next token is the most likely one, or, with a temperature T above 0, is
drawn from

    p = softmax(logits / T), of which the `top_k` most likely tokens are kept, and of these the
        fewest most likely ones that together have the probability `top_p`.

Source of the latter: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from disha.finetune.errors import CheckpointError, DataError
from disha.finetune.models.decoder import Decoder, KeyValueCache
from disha.finetune.models.factory import logits_for
from disha.finetune.text.tokenizer import Tokenizer

__all__ = ["complete", "context_of", "generate", "stream_text"]

CONTEXT_NAMES = ("context", "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
"""What configurations call the longest sequence that a model takes."""

REPLACEMENT = "\ufffd"
"""What stands for bytes that are no whole character."""


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    ends: frozenset[int],
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Iterator[int]:
    """Yield the tokens that continue a text, each as soon as it is known.

    The model is in evaluation mode until the last one.

    Args:
        model: the language model, with or without adapters.
        prompt_ids: the text so far, at least one token.
        max_new_tokens: most tokens to yield; fewer if the model takes no more.
        ends: token ids that end the text; they are not yielded.
        temperature: 0 takes the most likely token each time.
        top_k: how many of the most likely tokens to draw from; None for all.
        top_p: how much probability the tokens to draw from must have together.
        seed: decides what is drawn; None draws from PyTorch's own random numbers.

    Raises:
        DataError: there is no prompt, or it leaves no room in what the model takes.
        CheckpointError: the model fails, returns no logits, or such as are no numbers.
    """
    room = _room(model, [prompt_ids], max_new_tokens)
    draw = _Draw(temperature, top_k, top_p, _random_numbers(seed))
    with _evaluating(model):
        run = _run_of(model, rows=1, capacity=len(prompt_ids) + room)
        tokens = torch.tensor([list(prompt_ids)], device=_device_of(model))
        for _ in range(room):
            chosen = draw.next_token(_numbers(run.logits_after(tokens))[0])
            if chosen in ends:
                return
            yield chosen
            tokens = tokens.new_tensor([[chosen]])


@torch.no_grad()
def complete(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    ends: frozenset[int],
) -> list[list[int]]:
    """The most likely continuation of each of several texts.

    Texts of one length are continued together; none is padded, so each continuation is the one it
    has alone.

    Args:
        model: the language model, with or without adapters.
        prompts: the texts so far, each of at least one token.
        max_new_tokens: most tokens of a continuation; fewer if the model takes no more.
        ends: token ids that end a text; they are left out.

    Raises:
        DataError: a prompt is empty, or leaves no room in what the model takes.
        CheckpointError: the model fails, returns no logits, or such as are no numbers.
    """
    _room(model, prompts, max_new_tokens)
    continuations: list[list[int]] = [[] for _ in prompts]
    with _evaluating(model):
        for places in _places_by_length(prompts).values():
            together = [prompts[place] for place in places]
            made = _complete_together(model, together, max_new_tokens, ends)
            for place, continuation in zip(places, made, strict=True):
                continuations[place] = continuation
    return continuations


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yield the text of tokens piece by piece, each as soon as its characters are whole.

    The pieces joined are what the tokenizer makes of all tokens at once.

    Args:
        tokenizer: of the model that the tokens come from.
        ids: the tokens, as they become known.
    """
    seen: list[int] = []
    told = ""
    for index in ids:
        seen.append(index)
        if tokenizer.settles(index):
            text = tokenizer.decode(seen).rstrip(REPLACEMENT)
            if len(text) > len(told) and text.startswith(told):
                yield text[len(told) :]
                told = text
    rest = tokenizer.decode(seen)[len(told) :]
    if rest:
        yield rest


def context_of(model: nn.Module) -> int | None:
    """How many tokens a model takes, as its configuration says; None if it does not."""
    config = getattr(model, "config", None)
    found = [getattr(config, name, None) for name in CONTEXT_NAMES]
    return next((size for size in found if type(size) is int and size > 0), None)


class _Run(Protocol):
    """Texts of one length, and what the model has to go through for the next token of each."""

    def logits_after(self, tokens: Tensor) -> Tensor:
        """Add tokens (rows, time); return the logits (rows, vocabulary) of those that follow."""


class _CachedRun:
    """Our decoder goes through new tokens only."""

    def __init__(self, model: Decoder, rows: int, capacity: int) -> None:
        weight = model.model.embed_tokens.weight
        self._model = model
        self._cache = KeyValueCache(
            model.config, batch=rows, capacity=capacity, dtype=weight.dtype, device=weight.device
        )

    def logits_after(self, tokens: Tensor) -> Tensor:
        hidden = self._model.model(tokens, self._cache)
        logits: Tensor = self._model.lm_head(hidden[:, -1])
        return logits


class _WholeRun:
    """Any other model goes through the whole text."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tokens: Tensor | None = None

    def logits_after(self, tokens: Tensor) -> Tensor:
        before = [] if self._tokens is None else [self._tokens]
        self._tokens = torch.cat([*before, tokens], dim=1)
        return logits_for(self._model, self._tokens)[:, -1]


@dataclass(frozen=True)
class _Draw:
    """How the next token is chosen.

    Args:
        temperature: 0 takes the most likely token.
        top_k: how many of the most likely tokens to draw from.
        top_p: how much probability they must have together.
        random_numbers: where chance comes from; None for PyTorch's own.
    """

    temperature: float
    top_k: int | None
    top_p: float
    random_numbers: torch.Generator | None

    def next_token(self, logits: Tensor) -> int:
        """A token id, chosen by its logits (vocabulary)."""
        if self.temperature == 0:
            return int(logits.argmax())
        # On the CPU, so that a seed gives the same text wherever the model is.
        chances, ids = self.chances(logits.cpu())
        place = torch.multinomial(chances, 1, generator=self.random_numbers)
        return int(ids[place])

    def chances(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of the tokens to draw from, and their ids, the most likely first."""
        # In float64, from 0 downwards, so that no temperature makes infinities of logits.
        ranked, ids = logits.double().sort(descending=True, stable=True)
        chances = ((ranked - ranked[0]) / self.temperature).softmax(-1)
        if self.top_k is not None:
            chances, ids = chances[: self.top_k], ids[: self.top_k]
            chances = chances / chances.sum()
        if self.top_p < 1:
            # A token is needed as long as those before it have too little.
            needed = max(1, int((chances.cumsum(-1) - chances < self.top_p).sum()))
            chances, ids = chances[:needed], ids[:needed]
        return chances, ids


def _complete_together(
    model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: frozenset[int]
) -> list[list[int]]:
    """Continue texts of one length until each has ended."""
    room = _room(model, prompts, max_new_tokens)
    run = _run_of(model, rows=len(prompts), capacity=len(prompts[0]) + room)
    tokens = torch.tensor([list(prompt) for prompt in prompts], device=_device_of(model))
    continuations: list[list[int]] = [[] for _ in prompts]
    unfinished = set(range(len(prompts)))
    for _ in range(room):
        chosen = _numbers(run.logits_after(tokens)).argmax(dim=-1)
        for row, token in enumerate(chosen.tolist()):
            if token in ends:
                unfinished.discard(row)
            elif row in unfinished:
                continuations[row].append(token)
        if not unfinished:
            break
        tokens = chosen.unsqueeze(-1)
    return continuations


def _numbers(logits: Tensor) -> Tensor:
    if logits.isnan().any():
        raise CheckpointError(
            "the model's logits are no numbers (NaN); its weights or its adapter's are damaged, or "
            "too large for its number format"
        )
    return logits


def _places_by_length(prompts: Sequence[Sequence[int]]) -> Mapping[int, list[int]]:
    places: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        places.setdefault(len(prompt), []).append(place)
    return places


def _run_of(model: nn.Module, *, rows: int, capacity: int) -> _Run:
    plain = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    return _CachedRun(plain, rows, capacity) if isinstance(plain, Decoder) else _WholeRun(model)


def _room(model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """How many tokens can be added to each of `prompts`."""
    if not all(prompts):
        raise DataError("there is no text to continue: a prompt must have at least one token")
    context = context_of(model)
    if context is None or not prompts:
        return max_new_tokens
    longest = max(map(len, prompts))
    if longest >= context:
        raise DataError(
            f"a prompt of {longest} tokens leaves no room for an answer in the {context} that the "
            "model takes; shorten it"
        )
    return min(max_new_tokens, context - longest)


def _random_numbers(seed: int | None) -> torch.Generator | None:
    return None if seed is None else torch.Generator().manual_seed(seed)


def _device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode meanwhile, and each module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
