"""Continues texts with a language model, token by token.

`Memory` keeps what a model has computed of the text so far. At temperature 0, the next token is the
most likely one. At a temperature T above 0, it is drawn from

    p = softmax(logits / T)

`top_k` keeps that many of the most likely tokens. Of these, `top_p` keeps the fewest most likely
tokens whose probabilities sum to at least `top_p`.

Source of `top_p`: Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from disha.finetune.errors import CheckpointError, DataError
from disha.finetune.models.decoder import Decoder, KeyValueCache
from disha.finetune.models.factory import called, tensor_of
from disha.finetune.text.tokenizer import Tokenizer

__all__ = [
    "Memory",
    "complete",
    "context_of",
    "generate",
    "likely_tokens",
    "stream_text",
    "text_config",
]

CONTEXT_NAMES = ("context", "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
"""Names under which configurations store the longest sequence of a model."""

CACHES = ("cache", "past_key_values", "cache_params")
"""Names of the argument of a model that takes its cache. Models of transformers return the cache
under the same name."""

REPLACEMENT = "\ufffd"
"""The character that a tokenizer writes for an incomplete character."""

Choose: TypeAlias = Callable[[Tensor], Tensor]
"""Chooses the next tokens (rows,) from logits (rows, vocabulary)."""


class Memory:
    """A text that a model has read, and what the model has computed of it.

    The built-in decoder keeps keys and values, and models of transformers keep what their own cache
    holds. Any other model reads the complete text again for every token. A memory belongs to the
    model as it is: after a change of the adapter, use another memory.

    Args:
        model: the language model, with or without adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = getattr(model, "_orig_mod", model)  # the module inside torch.compile's
        taken = inspect.signature(self._model.forward).parameters
        self._cache_name = next((name for name in CACHES if name in taken), "")
        options = {"use_cache": bool(self._cache_name), "logits_to_keep": 1}
        self._options = {name: value for name, value in options.items() if name in taken}
        self._text: Tensor | None = None
        self._cache: Any = None

    def logits_after(self, tokens: Tensor) -> Tensor:
        """Read further tokens (rows, time), and return the logits (rows, vocabulary) after them.

        Raises:
            CheckpointError: the model fails, or returns no logits.
        """
        text, cache = self._text, self._cache
        self._text = self._cache = None  # nothing half-read is left if this is interrupted
        text = tokens if text is None else torch.cat((text, tokens), dim=1)
        pieces: Sequence[Tensor] = [tokens if cache is not None else text]
        if cache is not None and getattr(self._model, "_is_stateful", False):
            # Given several tokens at once, some recurrent models would begin a new text.
            pieces = torch.split(tokens, 1, dim=1)
        for piece in pieces:
            logits, cache = self._read(piece, cache)
        self._text, self._cache = text, cache
        return logits

    def unread(self, text: Sequence[int]) -> Sequence[int]:
        """Return the tokens of a text that are still to be read, at least one.

        The memory keeps the beginning that it shares with the text, and forgets the rest.
        """
        known = [] if self._text is None else self._text[0].tolist()
        pairs = enumerate(zip(known, text[:-1], strict=False))
        end = min(len(known), len(text) - 1)
        shared = next((place for place, (one, other) in pairs if one != other), end)
        if shared == len(known):
            return text[shared:]
        if self._text is not None and isinstance(self._cache, KeyValueCache):
            self._text = self._text[:, :shared]
            self._cache.cut(shared)
            return text[shared:]
        self._text = self._cache = None  # other caches can't always go back
        return text

    def _read(self, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Return the logits after tokens that follow those in the cache, and the cache."""
        if isinstance(self._model, Decoder):
            cache = cache or KeyValueCache()
            return self._model(tokens, cache, logits_to_keep=1)[:, -1], cache
        given = {} if cache is None else {self._cache_name: cache}
        output = called(self._model, tokens, **given, **self._options)
        return tensor_of(output)[:, -1], getattr(output, self._cache_name, None)


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
    memory: Memory | None = None,
) -> Iterator[int]:
    """Yield the tokens that continue a text, each as soon as it is known.

    The model is in evaluation mode until the last token.

    Args:
        model: the language model, with or without adapters.
        prompt_ids: the text so far, at least one token.
        max_new_tokens: most tokens to yield; fewer if the model's context is full.
        ends: token ids that end the text; they are not yielded.
        temperature: 0 takes the most likely token each time.
        top_k: how many of the most likely tokens to draw from; None for all.
        top_p: draw from the most likely tokens that together have this probability.
        seed: makes the result reproducible; None uses PyTorch's global random numbers.
        memory: an earlier text of this model, such as the turns before. What `prompt_ids` shares
            with it is not computed again. Afterwards it holds this text, without the last token.

    Raises:
        DataError: the prompt is empty, or leaves no room in the context of the model.
        CheckpointError: the model fails, returns no logits, or returns NaN.
    """
    random_numbers = None if seed is None else torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> Tensor:
        if temperature == 0:
            return logits.argmax(dim=-1)
        # Sample on the CPU, so that a seed gives the same text on every device.
        chances, ids = likely_tokens(logits[0].cpu(), temperature, top_k, top_p)
        return ids[torch.multinomial(chances, 1, generator=random_numbers)]

    for [token] in _continued(model, [prompt_ids], max_new_tokens, choose, memory):
        if token in ends:
            return
        yield token


def complete(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    ends: frozenset[int],
) -> list[list[int]]:
    """Return the most likely continuation of each of several texts.

    Texts of the same length are continued together. There is no padding, so each text gets the same
    continuation as on its own.

    Args:
        model: the language model, with or without adapters.
        prompts: the texts so far, each of at least one token.
        max_new_tokens: most tokens of a continuation; fewer if the model's context is full.
        ends: token ids that end a text; they are left out.

    Raises:
        DataError: a prompt is empty, or leaves no room in the context of the model.
        CheckpointError: the model fails, returns no logits, or returns NaN.
    """
    _room(model, prompts, max_new_tokens)
    continuations: list[list[int]] = [[] for _ in prompts]
    for length in {len(prompt) for prompt in prompts}:
        unfinished = [place for place, prompt in enumerate(prompts) if len(prompt) == length]
        together = list(unfinished)
        rows = [prompts[place] for place in together]
        for tokens in _continued(model, rows, max_new_tokens, lambda x: x.argmax(dim=-1)):
            chosen = dict(zip(together, tokens, strict=True))
            unfinished = [place for place in unfinished if chosen[place] not in ends]
            for place in unfinished:
                continuations[place].append(chosen[place])
            if not unfinished:
                break
    return continuations


def likely_tokens(
    logits: Tensor, temperature: float, top_k: int | None = None, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the probabilities of the tokens to draw from, and their ids, most likely first.

    Args:
        logits: (vocabulary,).
        temperature: greater than 0.
        top_k: how many of the most likely tokens to draw from; None for all.
        top_p: draw from the most likely tokens that together have this probability.
    """
    # Use float64, and subtract the largest logit, so that no temperature causes an overflow.
    ranked, ids = logits.double().sort(descending=True, stable=True)
    chances = ((ranked - ranked[0]) / temperature).softmax(-1)[:top_k]
    chances = chances / chances.sum()
    if top_p < 1:
        # A token is needed if the tokens before it have less than top_p together.
        needed = max(1, int((chances.cumsum(-1) - chances < top_p).sum()))
        chances = chances[:needed]
    return chances, ids[: len(chances)]


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yield the text of tokens piece by piece, each as soon as its characters are complete.

    The joined pieces equal the text of all tokens decoded at once.

    Args:
        tokenizer: the model's tokenizer.
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


def context_of(model: object) -> int | None:
    """Return how many tokens a model's configuration allows; None if it sets no limit."""
    config = text_config(model)
    found = [getattr(config, name, None) for name in CONTEXT_NAMES]
    return next((size for size in found if type(size) is int and size > 0), None)


def text_config(model: object) -> object:
    """Return a model's configuration. If the model also takes images, return the part for text."""
    config = getattr(model, "config", None)
    of_text = getattr(config, "get_text_config", None)
    return config if of_text is None else of_text()


@torch.no_grad()
def _continued(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    choose: Choose,
    memory: Memory | None = None,
) -> Iterator[list[int]]:
    """Yield the next token of each of several texts of the same length, until there is no room."""
    room = _room(model, prompts, max_new_tokens)
    parameter = next(model.parameters(), torch.empty(0))
    if memory is None:
        memory = Memory(model)
    else:
        prompts = [memory.unread(prompts[0])]
    tokens = torch.tensor([list(prompt) for prompt in prompts], device=parameter.device)
    with _evaluating(model):
        for _ in range(room):
            logits = memory.logits_after(tokens)
            if logits.isnan().any():
                raise CheckpointError(
                    "the model returns NaN as logits; its weights or its adapter's are damaged, or "
                    "too large for its number format"
                )
            chosen = choose(logits)
            yield chosen.tolist()
            tokens = chosen.to(tokens).unsqueeze(-1)


def _room(model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """Return how many tokens can be added to each of `prompts`."""
    if not all(prompts):
        raise DataError("there is no text to continue: a prompt must have at least one token")
    context = context_of(model)
    if context is None or not prompts:
        return max_new_tokens
    longest = max(map(len, prompts))
    if longest >= context:
        raise DataError(
            f"a prompt of {longest} tokens leaves no room for an answer: the model takes at most "
            f"{context} tokens; shorten the prompt"
        )
    return min(max_new_tokens, context - longest)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode during the block, then restore the mode of each module."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
