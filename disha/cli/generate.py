"""``disha generate``: answers to prompts, or a conversation."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TextStreamer, set_seed

from disha.cli.dispatcher import Parser
from disha.cli.models import Asker, add_model_flags, opened
from disha.cli.output import fit, show
from disha.errors import ArgumentError

__all__ = ["main"]

USAGE = """Answer prompts with a model, with or without an adapter. Without --prompt, the prompts
are the lines of standard input. On a terminal, a conversation starts instead.

examples:
  disha generate --adapter output/adapter.safetensors --prompt 'What is a shard?'
  disha generate --adapter output/adapter.safetensors  # a conversation, on a terminal
  disha generate --base model.gguf --adapter output/adapter.safetensors --compare < prompts.txt"""


def main(words: Sequence[str]) -> None:
    """Answer prompts."""
    parser = Parser("generate", USAGE)
    add_model_flags(parser)
    parser.add_argument("--prompt", nargs="+", help="the texts to answer")
    parser.add_argument("--temperature", type=float, help="sample; higher is more random")
    parser.add_argument("--top_k", type=int, help="sample from so many most likely tokens")
    parser.add_argument("--top_p", type=float, help="sample from the tokens of this probability")
    parser.add_argument("--seed", type=int, default=0, help="makes sampling reproducible")
    flags = parser.parsed(words)
    prompts: list[str] | None = flags.prompt or _lines()
    if prompts is None and (flags.compare or flags.json):
        raise ArgumentError("--compare and --json are not for a conversation; give --prompt")
    asker = opened(flags)
    sampling = {name: getattr(flags, name) for name in ("temperature", "top_k", "top_p")}
    sampling = {name: value for name, value in sampling.items() if value}
    options = {"max_new_tokens": flags.max_new_tokens, "do_sample": bool(sampling), **sampling}
    set_seed(flags.seed)
    bases = [asker.answers([one], **options)[0] for one in prompts or () if flags.compare]
    if flags.adapter is not None:
        asker.load(flags)
    if prompts is None:
        _converse(Conversation(asker, options))
    elif flags.compare or flags.json:
        answers = [asker.answers([one], **options)[0] for one in prompts]
        _show_all(flags.json, {"prompt": prompts, "base_answer": bases, "answer": answers})
    else:
        _stream_all(prompts, asker, options)


def _lines() -> list[str] | None:
    """Return the lines of standard input; None on a terminal."""
    if sys.stdin.isatty():
        return None
    lines = [line.strip() for line in sys.stdin if line.strip()]
    if not lines:
        raise ArgumentError("there is no prompt; give --prompt 'a text'")
    return lines


def _stream_all(prompts: Sequence[str], asker: Asker, options: Mapping[str, Any]) -> None:
    """Print each answer as it comes, and above it the prompt if there are several."""
    for prompt in prompts:
        if len(prompts) > 1:
            print(f"> {fit(prompt)}")
        asker.answers([prompt], streamer=Printer(asker), **options)


def _show_all(as_json: bool, columns: Mapping[str, Sequence[str]]) -> None:
    filled = {name: column for name, column in columns.items() if column}
    rows = [dict(zip(filled, row, strict=True)) for row in zip(*filled.values(), strict=True)]
    texts = ["\n".join(f"{name}: {text}" for name, text in row.items()) for row in rows]
    show(as_json, "\n\n".join(texts), {"answers": rows})


class Printer(TextStreamer):
    """Prints an answer as it comes, with everything escaped that a terminal can't show."""

    def __init__(self, asker: Asker) -> None:
        super().__init__(asker.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a piece."""
        print(fit(text), end="\n" if stream_end else "", flush=True)


class Conversation:
    """Turns of questions and answers. What the model has read stays in its cache.

    Args:
        asker: the model.
        options: the arguments of `model.generate`.
    """

    def __init__(self, asker: Asker, options: Mapping[str, Any]) -> None:
        self.asker, self.options = asker, options
        self.turns: list[dict[str, str]] = []
        self._cache: Any = None
        self._read: list[int] = []

    def ask(self, question: str) -> None:
        """Print the answer to a question as it comes, and remember both."""
        turns = [*self.turns, {"role": "user", "content": question}]
        inputs = self.asker.encoded([turns])
        while self._is_too_long(inputs) and len(turns) > 2:
            turns = turns[2:]  # forget the oldest question and answer
            inputs = self.asker.encoded([turns])
        ids = inputs["input_ids"][0].tolist()
        is_known = ids[: len(self._read)] == self._read
        known = {"past_key_values": self._cache} if self._cache and is_known else {}
        self._cache, self._read = None, []  # an answer that is stopped leaves half a cache
        model: Any = self.asker.model
        found = model.generate(
            **inputs,
            **known,
            **self.options,
            streamer=Printer(self.asker),
            return_dict_in_generate=True,
        )
        whole = found.sequences[0].tolist()
        self._cache, self._read = found.past_key_values, whole[:-1]
        answer = str(self.asker.tokenizer.decode(whole[len(ids) :], skip_special_tokens=True))
        self.turns = [*turns, {"role": "assistant", "content": answer}]

    def _is_too_long(self, inputs: Any) -> bool:
        limit = getattr(self.asker.model.config, "max_position_embeddings", None)
        length = inputs["input_ids"].shape[1] + self.options["max_new_tokens"]
        return limit is not None and length > limit


def _converse(conversation: Conversation) -> None:
    """Read questions from the terminal until the end."""
    print("Ctrl-C stops an answer, and its question is forgotten. Ctrl-D ends.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return print()
        try:
            if line:
                conversation.ask(line)
        except KeyboardInterrupt:
            print("\n(stopped)")
