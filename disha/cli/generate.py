"""Answer prompts with a model, with or without an adapter.

Without --prompt, the prompts are the lines of standard input. On a terminal, a conversation starts
instead. Answers are written as they come.

Examples:
  disha generate --adapter output/adapter.safetensors --prompt 'What is a shard?'
  disha generate --adapter output/adapter.safetensors  # a conversation, on a terminal
  disha generate --base model.gguf --adapter output/adapter.safetensors < prompts.txt
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import TextStreamer, set_seed

from disha.cli.dispatcher import Parser
from disha.cli.models import Asker, add_model_flags, opened
from disha.cli.output import fit
from disha.errors import ArgumentError

SAMPLING = ("temperature", "top_k", "top_p")


def main(words: Sequence[str]) -> None:
    """Answer prompts."""
    parser = Parser("generate", __doc__)
    add_model_flags(parser)
    parser.add_argument("--prompt", nargs="+", help="the texts to answer")
    parser.add_argument("--temperature", type=float, help="sample; higher is more random")
    parser.add_argument("--top_k", type=int, help="sample from so many most likely tokens")
    parser.add_argument("--top_p", type=float, help="sample from the tokens of this probability")
    parser.add_argument("--seed", type=int, default=0, help="makes sampling reproducible")
    flags = parser.parsed(words)
    prompts = list(filter(None, flags.prompt or ())) or _lines()
    asker = opened(flags)
    if flags.adapter is not None:
        asker.load(flags)
    set_seed(flags.seed)
    sampling = {name: value for name in SAMPLING if (value := getattr(flags, name))}
    options = {"max_new_tokens": flags.max_new_tokens, "do_sample": bool(sampling), **sampling}
    if prompts is None:
        _converse(Conversation(asker, options))
        return
    for prompt in prompts:
        if len(prompts) > 1:
            print(f"> {fit(prompt)}")
        asker.answers([prompt], streamer=Printer(asker), **options)


def _lines() -> list[str] | None:
    """Return the lines of standard input; None on a terminal."""
    if sys.stdin.isatty():
        return None
    lines = [line.strip() for line in sys.stdin if line.strip()]
    if not lines:
        raise ArgumentError("there is no prompt; give --prompt 'a text'")
    return lines


class Printer(TextStreamer):
    """Prints an answer as it comes, with everything escaped that a terminal can't show."""

    def __init__(self, asker: Asker) -> None:
        super().__init__(asker.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a piece."""
        print(fit(text), end="\n" if stream_end else "", flush=True)


@dataclass
class Conversation:
    """Turns of questions and answers. What the model has read stays in its cache."""

    asker: Asker
    options: Mapping[str, Any]
    turns: list[dict[str, str]] = field(default_factory=list)
    _cache: Any = None
    _read: list[int] = field(default_factory=list)

    def ask(self, question: str) -> None:
        """Print the answer to a question as it comes, and remember both."""
        turns = [*self.turns, {"role": "user", "content": question}]
        inputs = self.asker.encoded([turns])
        ids = inputs["input_ids"][0].tolist()
        is_known = self._cache is not None and ids[: len(self._read)] == self._read
        known = {"past_key_values": self._cache} if is_known else {}
        self._cache = None  # an answer that is stopped leaves half a cache
        streamer = Printer(self.asker)
        generated = self.asker.model.generate(
            **inputs, **known, **self.options, streamer=streamer, return_dict_in_generate=True
        )
        whole = generated.sequences[0].tolist()
        self._cache = generated.past_key_values
        self._read = whole[:-1]
        answer = self.asker.tokenizer.decode(whole[len(ids) :], skip_special_tokens=True)
        self.turns = [*turns, {"role": "assistant", "content": answer}]


def _converse(conversation: Conversation) -> None:
    """Read questions from the terminal until the end."""
    print("Ctrl-C stops an answer, and its question is forgotten. Ctrl-D ends.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        try:
            if line:
                conversation.ask(line)
        except KeyboardInterrupt:
            print("\n(stopped)")
