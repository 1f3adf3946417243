"""Generates answers with and without the adapter: ``disha generate``."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import disha
from disha.files import read_text
from disha.finetune.adapting import with_adapter, without_adapter
from disha.finetune.base_model import open_base_model
from disha.finetune.errors import DataError, SettingsError, raised_as
from disha.finetune.generation import Memory, generate, stream_text
from disha.finetune.settings import GenerateSettings, SamplingSettings
from disha.finetune.text.templates import Template, given_template, template_from
from disha.finetune.text.tokenizer import Tokenizer, is_text

__all__ = [
    "TEMPLATE_KEY",
    "Answerer",
    "noted_template",
    "open_answerer",
    "prompts_of",
    "template_of",
]

TEMPLATE_KEY = "template"
"""The key under which an adapter file notes the template that it was trained with."""


STANDARD_INPUT = Path("/dev/stdin")
"""The file of prompts if no flag gives prompts."""


@dataclass(frozen=True)
class Answerer:
    """A model that answers prompts.

    Args:
        model: the model, in evaluation mode, with or without an adapter.
        tokenizer: its tokenizer.
        template: the text around a prompt; None for the prompt alone.
        sampling: how the next token is chosen.
        base: the base model's values of the parameters that are trained with the adapter.
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

    def answer(self, query: str) -> Generator[str]:
        """Yield the answer to a query piece by piece.

        Raises:
            DataError: the query leaves no room for an answer.
        """
        return self.continuation(self.prompt(query))

    def base_answer(self, prompt: str) -> Generator[str]:
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
    # The file may be from a stranger. So its note is a text, and never names another file.
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
    with raised_as(DataError, "--prompt_file: "):
        text = read_text(path, pipes=True)
    # Only a line feed ends a line, as in a file of rows.
    prompts = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    if not prompts:
        raise DataError(
            f"{path} holds no prompt; it must hold one per line, or give --prompt 'a text'"
        )
    return prompts
