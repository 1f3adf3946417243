"""The base, the adapter and the prompts of `disha generate`, `evaluate` and `check-server`."""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import disha
from disha.cli.dispatcher import Parser
from disha.errors import AdapterFileWarning, ArgumentError
from disha.finetune.flags import BITS, COUNT

Message = dict[str, Any]
Prompt = str | Sequence[Message]  # a text, or the messages of a conversation

TOKENS = 256
"""Tokens of the longest answer, where no flag limits it and the model has as many positions."""


def add_model_flags(parser: Parser) -> None:
    """Add the flags that name a model."""
    names = ("--base", "--base_model_name_or_path")
    parser.add_argument("--adapter", type=Path, help="an adapter file, or a folder of PEFT")
    parser.add_argument(*names, metavar="MODEL", help="a folder, a GGUF file or a name; as noted")
    parser.add_argument("--bits", choices=BITS, help="how weights are stored; as noted")
    parser.add_argument("--force", action="store_true", help="also on a base that is not its own")
    parser.add_argument("--attn_implementation", help="such as sdpa, eager or flash_attention_2")


def add_answer_flags(parser: Parser) -> None:
    """Add the flags that limit the answers of a model."""
    parser.add_argument(
        "--max_new_tokens",
        type=COUNT,
        help=f"tokens of the longest answer; at most {TOKENS} by default",
    )


@dataclass(frozen=True)
class PromptRunner:
    """A model that answers prompts, by its chat template if `is_chat` is set."""

    model: Any
    tokenizer: Any
    is_chat: bool

    def load_adapter(self, flags: Namespace) -> None:
        """Load the adapter, which must belong to the base."""
        action: Any = "default" if flags.force else "error"
        try:
            with warnings.catch_warnings(action=action, category=AdapterFileWarning):
                disha.load_adapter(self.model, flags.adapter)
        except AdapterFileWarning as error:
            raise ArgumentError(f"{error}; --force uses it all the same") from error

    def render(self, prompt: Prompt, tools: Sequence[Any] | None = None) -> str:
        """Return the text that the model reads for a prompt."""
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self.is_chat:
            return self.tokenizer.apply_chat_template(
                turns, tools=tools, tokenize=False, add_generation_prompt=True
            )
        if tools:
            raise ArgumentError("tools need a model that is asked by a chat template")
        return "\n".join(turn["content"] for turn in turns)

    def answer(
        self, texts: Sequence[str], max_new_tokens: int | None = None, **options: Any
    ) -> list[str]:
        """Return the answers to rendered prompts, which are answered together."""
        inputs = self.tokenizer(
            texts,
            add_special_tokens=not self.is_chat,
            padding=True,
            padding_side="left",
            return_token_type_ids=False,
            return_tensors="pt",
        ).to(self.model.device)
        length = inputs["input_ids"].shape[1]
        options["max_new_tokens"] = self._limit(length, max_new_tokens)
        ids = self.model.generate(**inputs, **options)[:, length:]
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _limit(self, length: int, tokens: int | None) -> int:
        """Return how many tokens an answer may have after a prompt of so many tokens."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if positions is None:
            return tokens or TOKENS
        room = positions - length
        if room < 1:
            raise ArgumentError(
                f"a prompt of {length} tokens fills the {positions} positions of the model; "
                "shorten it"
            )
        if tokens is not None and tokens > room:
            raise ArgumentError(
                f"--max_new_tokens {tokens} after a prompt of {length} tokens is more than the "
                f"{positions} positions of the model; give at most {room}"
            )
        return tokens or min(TOKENS, room)


def load_runner(flags: Namespace) -> PromptRunner:
    """Return a runner of the base that the flags name, without the adapter."""
    if not flags.base and flags.adapter is None:
        raise ArgumentError("name the model with --base or --adapter")
    # Flags are checked before torch and transformers are imported, which take seconds.
    from disha.cli.output import tell_noted_base
    from disha.files import find_adapter
    from disha.finetune.base import best_device, load_base
    from disha.finetune.notes import PROMPT_KEY, read_noted_bits, read_notes
    from disha.finetune.templates import try_template

    notes: dict[str, str] = {}
    name: Any = flags.base
    if flags.adapter is not None:
        flags.adapter = find_adapter(flags.adapter)
        notes = read_notes(flags.adapter)
        try_template(flags.adapter, notes)
        name = name or tell_noted_base(flags.adapter, notes)
    bits = flags.bits or read_noted_bits(notes)
    model, tokenizer = load_base(name, bits, best_device(), notes, flags.attn_implementation)
    prompt_form = notes.get(PROMPT_KEY)
    if prompt_form == "chat" and not tokenizer.chat_template:
        raise ArgumentError(
            f"{flags.adapter} learned conversations, and {name} has no chat template; name a base "
            "that has it with --base"
        )
    is_chat = bool(tokenizer.chat_template) and prompt_form != "text"
    return PromptRunner(model, tokenizer, is_chat)
