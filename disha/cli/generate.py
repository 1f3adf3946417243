"""``disha generate``: answer prompts with a model, with or without an adapter."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from itertools import chain
from typing import TYPE_CHECKING, Any

from disha.cli.noted import parsed_with_base
from disha.cli.output import printable_on, show
from disha.finetune.errors import DataError
from disha.finetune.settings import GenerateSettings
from disha.text import counted

if TYPE_CHECKING:
    from disha.finetune.answering import Answerer
    from disha.finetune.conversation import Conversation

__all__ = ["run"]

DESCRIPTION = """Answer prompts with a model, with or without an adapter.

examples:
  disha generate --adapter out/adapter.safetensors --prompt 'What is a shard?'
  disha generate --adapter out/adapter.safetensors  # a conversation, on a terminal
  disha generate --base model.gguf --adapter out/adapter.safetensors \\
      --prompt_file prompts.txt --compare"""


COMMANDS = """/base   the base model's answer to the last question; the conversation does not change
/reset  forget all turns
/help   show this
/quit   end, as does Ctrl-D"""


def run(arguments: Sequence[str]) -> None:
    """Generate, with the given command-line arguments."""
    settings, suiting = parsed_with_base(GenerateSettings, "generate", arguments, DESCRIPTION)
    settings.check()
    # These take seconds to import. The help and errors about flags do not need them.
    from disha.finetune.answering import open_answerer, prompts_of
    from disha.finetune.conversation import Conversation
    from disha.finetune.training.machine import FEWER_BITS, explaining_lack_of_memory

    prompts = [] if settings.converses else prompts_of(settings)
    with explaining_lack_of_memory(f"shorten the prompt, or {FEWER_BITS}"):
        with suiting:
            answerer = open_answerer(settings)
        if settings.converses:
            has_base = bool(settings.adapter and not settings.merge)
            _converse(Conversation(answerer), has_base=has_base)
        elif settings.json:
            answers = [_fields(answerer, prompt, settings.compare) for prompt in prompts]
            show(True, "", {"answers": answers})
        else:
            _answer_all(answerer, prompts, settings.compare)


def _answer_all(answerer: Answerer, prompts: Sequence[str], compare: bool) -> None:
    """Print the answer to each prompt, and above it the prompt, if there are several."""
    for number, prompt in enumerate(prompts):
        if len(prompts) > 1:
            print(f"{'' if number == 0 else chr(10)}> {_fit(prompt)}")
        if compare:
            _print_side_by_side(answerer.base_answer(prompt), answerer.answer(prompt))
        else:
            _print_as_it_comes(answerer.answer(prompt))


def _converse(conversation: Conversation, *, has_base: bool) -> None:
    """Read questions and commands from the terminal until the end."""
    with suppress(ImportError):
        import readline  # noqa: F401  lets `input` edit lines and repeat earlier ones
    print("Ctrl-C stops an answer; /help shows the commands.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D ends the conversation")
            continue
        except UnicodeDecodeError:
            line = "\udcff"  # not valid text, so it is refused as a question
        if line == "/quit":
            return
        try:
            _respond(conversation, line, has_base)
        except KeyboardInterrupt:
            print("\n(stopped)")
        except DataError as error:
            print(f"disha: {_fit(str(error))}", file=sys.stderr)


def _respond(conversation: Conversation, line: str, has_base: bool) -> None:
    if line == "/reset":
        conversation.reset()
        print("(all turns are forgotten)")
    elif line == "/base" and not has_base:
        print("(there is no base model to compare with: no --adapter is given, or it is merged)")
    elif line == "/base":
        with closing(conversation.base_answer()) as pieces:
            _print_as_it_comes(pieces)
    elif line.startswith("/"):
        print("" if line == "/help" else f"({_fit(line)} is no command)\n", end="")
        print(COMMANDS)
    elif line:
        with closing(conversation.ask(line)) as pieces:
            first = next(pieces, "")
            if conversation.forgotten:
                turns = counted(conversation.forgotten, "turn")
                print(f"(the model's context is full; forgotten: the oldest {turns})")
            _print_as_it_comes(chain([first], pieces))


def _fields(answerer: Answerer, prompt: str, compare: bool) -> dict[str, Any]:
    answers = {"prompt": prompt, "answer": "".join(answerer.answer(prompt))}
    if compare:
        answers["base_answer"] = "".join(answerer.base_answer(prompt))
    return answers


def _print_as_it_comes(pieces: Iterable[str]) -> None:
    for piece in pieces:
        sys.stdout.write(_fit(piece))
        sys.stdout.flush()
    print()


def _print_side_by_side(base: Iterable[str], adapted: Iterable[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, expand=True, show_edge=False, pad_edge=False)
    table.add_column("base model", ratio=1)
    table.add_column("with the adapter", ratio=1)
    texts = (_fit("".join(pieces)).strip() for pieces in (base, adapted))
    # "fold" breaks a word that is wider than its column. The default cuts it off.
    table.add_row(*(Text(text, overflow="fold") for text in texts))
    Console(file=sys.stdout).print(table)


def _fit(text: str) -> str:
    return printable_on(sys.stdout, text.replace("\t", "    "))
