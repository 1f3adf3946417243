"""The base, the adapter and the prompts of `disha generate` and `disha evaluate`."""

from __future__ import annotations

import sys
import warnings
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import disha
from disha.cli.dispatcher import Parser
from disha.errors import AdapterFileWarning, ArgumentError
from disha.finetune.base import BITS, best_device, load_base, noted_base

Prompt = str | Sequence[dict[str, str]]  # a text, or the messages of a conversation


def add_model_flags(parser: Parser) -> None:
    """Add the flags that name a model, and limit its answers."""
    names = ("--base", "--base_model_name_or_path")
    parser.add_argument("--adapter", type=Path, help="the adapter file")
    parser.add_argument(*names, metavar="MODEL", help="a folder, a GGUF file or a name; as noted")
    parser.add_argument("--bits", choices=BITS, help="how weights are stored; as noted")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="the longest answer")


def noted(adapter: Path) -> tuple[str, str]:
    """Return the base that an adapter file notes, and its bits, and print which it is."""
    found = noted_base(adapter)
    print(f"the base is {found[0]}, with --bits {found[1]}, as {adapter} notes", file=sys.stderr)
    return found


@dataclass(frozen=True)
class Asker:
    """A model that answers prompts, by its chat template if `is_chat` is set."""

    model: Any
    tokenizer: Any
    is_chat: bool

    def load(self, flags: Namespace) -> None:
        """Load the adapter, which must belong to the base if its note has named this."""
        action: Any = "error" if flags.base is None else "default"
        with warnings.catch_warnings(action=action, category=AdapterFileWarning):
            disha.load_adapter(self.model, flags.adapter)

    def _text(self, prompt: Prompt) -> str:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not self.is_chat:
            return "\n".join(turn["content"] for turn in turns)
        return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def encoded(self, prompts: Sequence[Prompt]) -> Any:
        """Return prompts as one batch of tokens, padded on the left."""
        texts = [self._text(prompt) for prompt in prompts]
        found = self.tokenizer(
            texts,
            add_special_tokens=not self.is_chat,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        found.pop("token_type_ids", None)
        return found.to(self.model.device)

    def answers(self, prompts: Sequence[Prompt], **options: Any) -> list[str]:
        """Return the answer to each prompt; they are answered together."""
        inputs = self.encoded(prompts)
        ids = self.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def opened(flags: Namespace) -> Asker:
    """Return the base that the flags name, without the adapter."""
    if flags.adapter is None and flags.base is None:
        raise ArgumentError("name the model with --base or --adapter")
    name, bits = (flags.base, "fp32") if flags.base else noted(flags.adapter)
    notes = {} if flags.adapter is None else disha.inspect_adapter(flags.adapter).metadata
    model, tokenizer = load_base(name, flags.bits or bits, best_device(), notes)
    if notes.get("prompt") == "chat" and not tokenizer.chat_template:
        raise ArgumentError(
            f"{flags.adapter} learned conversations, and {name} has no chat template; name a base "
            "that has it with --base"
        )
    return Asker(model, tokenizer, bool(tokenizer.chat_template) and notes.get("prompt") != "text")
