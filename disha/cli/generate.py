"""``disha generate``: let a model answer, with and without an adapter."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from disha.cli.noted import parsed_with_base
from disha.cli.output import printable_on, show
from disha.finetune.answering import Answerer, GenerateSettings, open_answerer, prompts_of

__all__ = ["run"]

DESCRIPTION = """Let a model answer, with or without an adapter.

examples:
  disha generate --adapter out/adapter.safetensors --prompt 'What is a shard?'
  disha generate --base model.gguf --adapter out/adapter.safetensors \\
      --prompt_file prompts.txt --compare"""


def run(arguments: Sequence[str]) -> None:
    """Generate, with the given command-line arguments."""
    settings, suiting = parsed_with_base(GenerateSettings, "generate", arguments, DESCRIPTION)
    settings.check()
    prompts = prompts_of(settings)
    with suiting:
        answerer = open_answerer(settings)
    if settings.json:
        answers = [_fields(answerer, prompt, settings.compare) for prompt in prompts]
        show(True, "", {"answers": answers})
        return
    for number, prompt in enumerate(prompts):
        if len(prompts) > 1:
            print(f"{'' if number == 0 else chr(10)}> {_fit(prompt)}")
        if settings.compare:
            _print_side_by_side(answerer.base_answer(prompt), answerer.answer(prompt))
        else:
            _print_as_it_comes(answerer.answer(prompt))


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
