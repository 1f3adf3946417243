"""Answer prompts with a model, with or without an adapter.

Without --prompt, the prompts are the lines of standard input. On a terminal, a conversation starts
instead. Answers are written as they come; with --json, each is a line with a JSON object.

Examples:
  disha generate --adapter output/adapter.safetensors --prompt 'What is a shard?'
  disha generate --adapter output/adapter.safetensors  # a conversation, on a terminal
  disha generate --base model.gguf --adapter output/adapter.safetensors < prompts.txt
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TextStreamer, set_seed

from disha.cli.dispatcher import Parser
from disha.cli.models import PromptRunner, add_answer_flags, add_model_flags, load_runner
from disha.cli.output import fit
from disha.errors import ArgumentError

SAMPLING = ("temperature", "top_k", "top_p")


def main(words: Sequence[str]) -> None:
    """Answer prompts."""
    parser = Parser("generate", __doc__)
    add_model_flags(parser)
    add_answer_flags(parser)
    parser.add_argument("--prompt", nargs="+", action="extend", help="the texts to answer")
    parser.add_argument("--system", help="a text that comes before each prompt")
    parser.add_argument("--tools", type=Path, help="a JSON file with the tools that it may call")
    parser.add_argument("--temperature", type=float, help="sample; higher is more random")
    parser.add_argument("--top_k", type=int, help="sample from so many likely tokens; 0: all")
    parser.add_argument("--top_p", type=float, help="sample from tokens of this probability")
    parser.add_argument("--seed", type=int, default=0, help="makes sampling reproducible")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each prompt")
    flags = parser.parse(words)
    prompts = [prompt for prompt in flags.prompt or () if prompt] or _read_prompts()
    if prompts is None and flags.json:
        raise ArgumentError("--json needs a --prompt, or prompts on standard input")
    tools = None if flags.tools is None else json.loads(flags.tools.read_bytes())
    runner = load_runner(flags, flags.system, tools)
    if flags.adapter is not None:
        runner.load_adapter(flags)
    set_seed(flags.seed)
    options = {"max_new_tokens": flags.max_new_tokens, **_choose_sampling(flags)}
    if prompts is None:
        _converse(Conversation(runner, options))
        return
    for prompt in prompts:
        text = runner.render(prompt)
        if flags.json:
            [answer] = runner.answer([text], **options)
            print(json.dumps({"prompt": prompt, "answer": answer}), flush=True)
            continue
        if len(prompts) > 1:
            print(f"> {fit(prompt)}")
        runner.answer([text], streamer=Printer(runner), **options)


def _choose_sampling(flags: Namespace) -> dict[str, Any]:
    """Return how tokens are chosen: at a temperature of 0, always the most likely one."""
    given = {name: getattr(flags, name) for name in SAMPLING}
    given = {name: value for name, value in given.items() if value is not None}
    if not given or flags.temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, **given}


def _read_prompts() -> list[str] | None:
    """Return the lines of standard input; None on a terminal."""
    if sys.stdin.isatty():
        return None
    text = sys.stdin.read()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ArgumentError("there is no prompt; give --prompt 'a text'")
    return lines


class Printer(TextStreamer):
    """Prints an answer as it comes, with everything escaped that a terminal can't show."""

    def __init__(self, runner: PromptRunner) -> None:
        super().__init__(runner.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a piece."""
        end = "\n" if stream_end else ""
        print(fit(text), end=end, flush=True)


@dataclass
class Conversation:
    """Turns of questions and answers."""

    runner: PromptRunner
    options: Mapping[str, Any]
    turns: list[dict[str, str]] = field(default_factory=list)

    def ask(self, question: str) -> None:
        """Print the answer to a question as it comes, and remember both."""
        turns = [*self.turns, {"role": "user", "content": question}]
        text = self.runner.render(turns)
        [answer] = self.runner.answer([text], streamer=Printer(self.runner), **self.options)
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
