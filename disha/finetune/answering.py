"""Generates answers with and without the adapter: ``disha generate``."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn

import disha
from disha.files import read_text
from disha.finetune.adapting import with_adapter, without_adapter
from disha.finetune.base_model import open_base_model
from disha.finetune.errors import DataError, SettingsError
from disha.finetune.generation import Memory, generate, stream_text
from disha.finetune.settings import (
    Count,
    ModelSettings,
    NotNegative,
    Range,
    Seed,
    Switch,
    check_ranges,
    require,
    require_adapter,
)
from disha.finetune.text.templates import Template, given_template, template_from
from disha.finetune.text.tokenizer import Tokenizer, is_text

__all__ = [
    "TEMPLATE_KEY",
    "Answerer",
    "GenerateSettings",
    "SamplingSettings",
    "noted_template",
    "open_answerer",
    "prompts_of",
    "template_of",
]

TEMPLATE_KEY = "template"
"""The key under which an adapter file notes the template that it was trained with."""


STANDARD_INPUT = Path("/dev/stdin")


@dataclass(frozen=True)
class SamplingSettings:
    """The choice of the next token.

    Args:
        max_new_tokens: Most tokens to generate.
        temperature: With 0, take the most likely token each time. Above 0, enable sampling:
            higher is more random.
        top_p: Sample from the most likely tokens that together have this probability.
        top_k: Sample from this many most likely tokens.
        seed: Makes sampling reproducible.
    """

    max_new_tokens: Count = 256
    temperature: NotNegative = 0.0
    top_p: Annotated[float, Range("greater than 0 and at most 1", lambda value: 0 < value <= 1)] = (
        1.0
    )
    top_k: Count | None = None
    seed: Seed = 0


@dataclass(frozen=True)
class GenerateSettings:
    """All settings of `disha generate`. Flags may be spelled with underscores or dashes.

    Args:
        prompt: The texts to answer, each in quotes. Without prompt and prompt_file, standard input
            has one per line; on a terminal, it is a conversation.
        prompt_file: A file with one text to answer per line, in place of prompt. It may be a pipe.
        adapter: The adapter file, such as output/adapter.safetensors. Without it, the base model
            answers.
        template: The text around a prompt, as for fine-tuning: a text with {query} in it, chat,
            auto, or none for the prompt alone. The default is the adapter's own; without an
            adapter, a conversation uses chat where the tokenizer has a chat template.
        compare: Show the answers of the base model beside those with the adapter.
        merge: Merge the adapter into the weights first. The texts are the same, at the base
            model's speed.
        json: Print one JSON object, for scripts.
        debug: Show where an error came from.
    """

    model: ModelSettings = field(default_factory=ModelSettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    prompt: tuple[str, ...] = ()
    prompt_file: Path | None = None
    adapter: Path | None = None
    template: str | None = None
    compare: Switch = False
    merge: Switch = False
    json: Switch = False
    debug: Switch = False

    @property
    def converses(self) -> bool:
        """Whether somebody types the prompts, on a terminal."""
        return not self.prompt and self.prompt_file is None and sys.stdin.isatty()

    def check(self) -> None:
        """Check everything that can be checked without reading the model.

        Raises:
            SettingsError: a setting is missing, out of range, or contradicts another.
        """
        check_ranges(self)
        self.model.check()
        for name, plain in (("top_k", None), ("top_p", 1.0)):
            require(
                self.sampling.temperature > 0 or getattr(self.sampling, name) == plain,
                f"--{name} limits sampling, but --temperature 0 disables sampling; give a "
                "temperature above 0, such as 0.7",
            )
        require(
            not (self.prompt and self.prompt_file),
            "the texts to answer come from --prompt 'a text' or --prompt_file; give exactly one",
        )
        for name in ("compare", "json"):
            require(
                not (self.converses and getattr(self, name)),
                f"--{name} is not for a conversation, where /base compares; give --prompt 'a text'",
            )
        require_adapter(self.adapter, compare=self.compare, merge=self.merge)
        require(
            not (self.compare and self.merge),
            "--compare needs the base model, which --merge overwrites; leave one of them out",
        )


@dataclass(frozen=True)
class Answerer:
    """A model that answers prompts.

    Args:
        model: the model, in evaluation mode, with or without an adapter.
        tokenizer: its tokenizer.
        template: the text around a prompt; None for the prompt alone.
        sampling: how the next token is chosen.
        base: the base model's values of the parameters that are trained beside the adapter.
    """

    model: nn.Module
    tokenizer: Tokenizer
    template: Template | None
    sampling: SamplingSettings
    base: Mapping[str, Tensor] = field(default_factory=dict)

    def prompt(self, query: str) -> list[int]:
        """Return the token ids of a query in the template."""
        if self.template is not None:
            return self.template.prompt(query, self.tokenizer)
        return [*self.tokenizer.begin, *self.tokenizer.encode(query, special=False)]

    def continuation(
        self, ids: Sequence[int], answer: list[int] | None = None, memory: Memory | None = None
    ) -> Generator[str]:
        """Yield the text that continues token ids piece by piece.

        Args:
            ids: the prompt.
            answer: a list to add the tokens of the text to.
            memory: what the model has read before; see `generate`.

        Raises:
            DataError: the prompt leaves no room for an answer.
        """
        ends, sampling = self.tokenizer.ends, vars(self.sampling)

        def tokens() -> Iterator[int]:
            for token in generate(self.model, ids, ends=ends, memory=memory, **sampling):
                if answer is not None:
                    answer.append(token)
                yield token

        yield from stream_text(self.tokenizer, tokens())

    def answer(self, query: str) -> Iterator[str]:
        """Yield the answer to a query piece by piece.

        Raises:
            DataError: the query leaves no room for an answer.
        """
        return self.continuation(self.prompt(query))

    def base_answer(self, prompt: str) -> Iterator[str]:
        """Yield the answer of the model without its adapter."""
        with without_adapter(self.model, self.base):
            yield from self.answer(prompt)


def open_answerer(settings: GenerateSettings) -> Answerer:
    """Read the model that the settings name, with its adapter.

    Raises:
        DishaError: a file can't be used, or the adapter does not fit the model.
    """
    base = open_base_model(settings.model)
    if base.tokenizer is None:
        raise SettingsError(
            f"--model {settings.model.model} came without a tokenizer, so it can't be asked in "
            "text; let the function return a pair of the model and a tokenizer, or give --tokenizer"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Only the tokenizer's own template knows how it writes several turns.
    default = "chat" if settings.converses and base.tokenizer.chat_template else "auto"
    template = template_of(settings.template, settings.adapter, base.tokenizer, default)
    model, values = with_adapter(base.load(device), settings.adapter, merge=settings.merge)
    return Answerer(model, base.tokenizer, template, settings.sampling, values)


def template_of(
    given: str | None, adapter: Path | None, tokenizer: Tokenizer, default: str = "auto"
) -> Template | None:
    """Return the given template, else the adapter's, else the default.

    Raises:
        DishaError: the setting or the adapter file can't be used.
    """
    if given == "none":
        return None
    if given is not None:
        return given_template(given, tokenizer)
    return noted_template(adapter, tokenizer) or template_from(default, tokenizer)


def noted_template(adapter: Path | None, tokenizer: Tokenizer) -> Template | None:
    """Return the template noted in an adapter file; None without a file or a note.

    Raises:
        DishaError: the adapter file or its note can't be used.
    """
    note = None if adapter is None else disha.inspect_adapter(adapter).metadata.get(TEMPLATE_KEY)
    if note is None:
        return None
    # The file may be a stranger's: its note is a text, and never names a file.
    return template_from(note, tokenizer, f"the note in {adapter}")


def prompts_of(settings: GenerateSettings) -> list[str]:
    """Return the texts to answer.

    Raises:
        DataError: the file can't be read or holds no prompt, or a prompt is not valid text.
    """
    if settings.prompt and settings.prompt_file is None:
        for prompt in settings.prompt:
            if not is_text(prompt):
                raise DataError(f"--prompt must be UTF-8 text, got {prompt!a}")
        return list(settings.prompt)
    path = settings.prompt_file or STANDARD_INPUT
    try:
        text = read_text(path, pipes=True)
    except disha.DishaError as error:
        raise DataError(f"--prompt_file: {error}") from error
    prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise DataError(
            f"{path} holds no prompt; it must hold one per line, or give --prompt 'a text'"
        )
    return prompts
