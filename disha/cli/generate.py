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
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from disha.cli.dispatcher import Parser
from disha.cli.models import Message, add_answer_flags, add_model_flags, load_runner
from disha.cli.output import fit
from disha.errors import ArgumentError
from disha.finetune.flags import number

SAMPLING = ("temperature", "top_k", "top_p")


def main(words: Sequence[str]) -> None:
    """Answer prompts."""
    parser = Parser("generate", __doc__)
    add_model_flags(parser)
    add_answer_flags(parser)
    parser.add_argument("--prompt", nargs="+", action="extend", help="the texts to answer")
    parser.add_argument("--system", help="a text that comes before each prompt")
    parser.add_argument("--tools", type=Path, help="a JSON file with the tools that it may call")
    _add_sampling_flags(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON object for each prompt")
    flags = parser.parse(words)
    prompts = flags.prompt or _read_prompts()
    if "" in (prompts or ()):
        raise ArgumentError("a --prompt is empty; give it a text, or leave it out")
    if prompts is None and flags.json:
        raise ArgumentError("--json needs a --prompt, or prompts on standard input")
    tools = None if flags.tools is None else _read_tools(flags.tools)
    start = [] if flags.system is None else [{"role": "system", "content": flags.system}]
    runner = load_runner(flags)
    if flags.adapter is not None:
        runner.load_adapter(flags)
    from transformers import TextStreamer, set_seed

    set_seed(flags.seed)
    streamer = TextStreamer(runner.tokenizer, skip_prompt=True, skip_special_tokens=True)
    options = {"max_new_tokens": flags.max_new_tokens, **_choose_sampling(flags)}

    def answer(turns: Sequence[Message], **more: Any) -> str:
        [text] = runner.answer([runner.render(turns, tools)], **options, **more)
        return text

    if prompts is None:
        converse(start, partial(answer, streamer=streamer))
        return
    for prompt in prompts:
        turns = [*start, {"role": "user", "content": prompt}]
        if flags.json:
            print(json.dumps({"prompt": prompt, "answer": answer(turns)}), flush=True)
            continue
        if len(prompts) > 1:
            print(f"> {fit(prompt)}")
        answer(turns, streamer=streamer)


def _add_sampling_flags(parser: Parser) -> None:
    positive = number(float, 0)
    count = number(int, 0)
    share = number(float, 0, 1)
    seed = number(int, 0, 2**32 - 1)
    parser.add_argument("--temperature", type=positive, help="sample; higher is more random")
    parser.add_argument("--top_k", type=count, help="sample from so many likely tokens; 0: all")
    parser.add_argument("--top_p", type=share, help="sample from tokens of this probability")
    parser.add_argument("--seed", type=seed, default=0, help="makes sampling reproducible")


def _choose_sampling(flags: Namespace) -> dict[str, Any]:
    """Return how tokens are chosen: at a temperature of 0, always the most likely one."""
    given = {name: getattr(flags, name) for name in SAMPLING}
    given = {name: value for name, value in given.items() if value is not None}
    if flags.temperature == 0:
        given = {}
    return {"do_sample": bool(given), **given}


def _read_tools(path: Path) -> list[Any]:
    """Return the tools in a JSON file."""
    try:
        tools = json.loads(path.read_bytes())
    except OSError as error:
        raise ArgumentError(f"--tools: can't read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"--tools: {path} is no JSON ({error})") from error
    if not isinstance(tools, list):
        raise ArgumentError(f"--tools: {path} holds no list; give a JSON list of functions")
    return tools


def _read_prompts() -> list[str] | None:
    """Return the lines of standard input; None on a terminal."""
    if sys.stdin.isatty():
        return None
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ArgumentError(f"standard input is no UTF-8 ({error}); save it as UTF-8") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ArgumentError("there is no prompt; give --prompt 'a text'")
    return lines


def converse(turns: Sequence[Message], answer: Callable[[Sequence[Message]], str]) -> None:
    """Read questions from the terminal until the end. An answer sees all turns before it."""
    print("Ctrl-C stops an answer, and its question is forgotten. Ctrl-D ends.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if not line:
            continue
        asked = [*turns, {"role": "user", "content": line}]
        try:
            turns = [*asked, {"role": "assistant", "content": answer(asked)}]
        except KeyboardInterrupt:
            print("\n(stopped)")
