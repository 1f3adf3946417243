"""Asking a model, with and without its adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import disha
from disha.finetune.adapting import base_values, without_adapter
from disha.finetune.base_model import open_base_model
from disha.finetune.errors import DataError, SettingsError
from disha.finetune.generation import generate, stream_text
from disha.finetune.settings import GenerateSettings, SamplingSettings
from disha.finetune.text.templates import Template, template_from
from disha.finetune.text.tokenizer import Tokenizer, is_text

__all__ = [
    "TEMPLATE_KEY",
    "Answerer",
    "open_answerer",
    "prompts_of",
    "template_of",
    "with_adapter",
]

TEMPLATE_KEY = "template"
"""Where an adapter file notes the template that it was trained with."""


@dataclass(frozen=True)
class Answerer:
    """A model that answers prompts.

    Args:
        model: in evaluation mode, with an adapter or without.
        tokenizer: its tokenizer.
        template: what surrounds a prompt; None for the prompt alone.
        sampling: how the next token is chosen.
        base: of `base_values`, what parameters were that are trained beside the adapter.
    """

    model: nn.Module
    tokenizer: Tokenizer
    template: Template | None
    sampling: SamplingSettings
    base: Mapping[str, Tensor] = field(default_factory=dict)

    def answer(self, prompt: str) -> Iterator[str]:
        """Yield the answer to `prompt` piece by piece.

        Raises:
            DataError: the prompt leaves no room for an answer.
        """
        tokens = generate(
            self.model,
            self._prompt_ids(prompt),
            max_new_tokens=self.sampling.max_new_tokens,
            ends=self.tokenizer.ends,
            temperature=self.sampling.temperature,
            top_k=self.sampling.top_k,
            top_p=self.sampling.top_p,
            seed=self.sampling.seed,
        )
        yield from stream_text(self.tokenizer, tokens)

    def base_answer(self, prompt: str) -> Iterator[str]:
        """Yield the answer of the model without its adapter."""
        with without_adapter(self.model, self.base):
            yield from self.answer(prompt)

    def _prompt_ids(self, prompt: str) -> list[int]:
        if self.template is None:
            begin = [] if self.tokenizer.begin is None else [self.tokenizer.begin]
            return begin + self.tokenizer.encode(prompt, special=False)
        return self.template.prompt(prompt, self.tokenizer)


def open_answerer(settings: GenerateSettings) -> Answerer:
    """Read the model that settings name, with its adapter.

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
    template = template_of(settings.template, settings.adapter, base.tokenizer)
    model, values = with_adapter(base.load(device), settings.adapter, merge=settings.merge)
    return Answerer(model, base.tokenizer, template, settings.sampling, values)


def with_adapter(
    model: nn.Module, adapter: Path | None, *, merge: bool = False
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the model in evaluation mode, with an adapter from a file.

    Returns:
        The model; and the base model's values of parameters that the file replaces, for
        `without_adapter`.

    Raises:
        DishaError: the file can't be used, or does not fit the model.
    """
    model.eval()
    if adapter is None:
        return model, {}
    known = dict(model.named_parameters())
    values = base_values(model, known.keys() & set(disha.inspect_adapter(adapter).also_train))
    disha.load_adapter(model, adapter)
    if merge:
        disha.merge_adapters(model, untie=True, dense=True)
    return model, values


def template_of(given: str | None, adapter: Path | None, tokenizer: Tokenizer) -> Template | None:
    """The template to ask with: the one given, else the adapter's, else the usual.

    Raises:
        DishaError: the setting or the adapter file can't be used.
    """
    if given == "none":
        return None
    noted = None
    if given is None and adapter is not None:
        noted = disha.inspect_adapter(adapter).metadata.get(TEMPLATE_KEY)
    return template_from(given or noted or "auto", tokenizer)


def prompts_of(settings: GenerateSettings) -> list[str]:
    """The texts to answer.

    Raises:
        DataError: their file can't be read, or holds none; or one is no text.
    """
    if settings.prompt_file is None:
        for prompt in settings.prompt:
            if not is_text(prompt):
                raise DataError(f"--prompt must be UTF-8 text, got {prompt!a}")
        return list(settings.prompt)
    path = settings.prompt_file
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise DataError(f"there is no file of prompts {path}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason}") from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"{path} holds no prompt; it must hold one per line")
    return prompts
