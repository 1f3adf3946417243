"""``disha generate``: what a model answers, with an adapter and without."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from disha.cli.flags import parsed
from disha.cli.output import fit_for, show
from disha.finetune.answering import Answerer, open_answerer, prompts_of
from disha.finetune.settings import GenerateSettings

__all__ = ["run"]

DESCRIPTION = """Let a model answer, with an adapter or without.

examples:
  disha generate --base_model_name_or_path path/to/model --adapter out/adapter.safetensors \\
      --prompt 'What is a shard?'
  disha generate --base_model_name_or_path model.gguf --adapter out/adapter.safetensors \\
      --prompt_file prompts.txt --compare"""


def run(arguments: Sequence[str]) -> None:
    """Generate, as command-line `arguments` say."""
    settings = parsed(GenerateSettings, "generate", arguments, DESCRIPTION, GenerateSettings())
    settings.check()
    prompts = prompts_of(settings)
    answerer = open_answerer(settings)
    if settings.json:
        show(True, "", {"answers": [_fields(answerer, prompt, settings) for prompt in prompts]})
        return
    for number, prompt in enumerate(prompts):
        if len(prompts) > 1:
            print(f"{'' if number == 0 else chr(10)}> {prompt}")
        if settings.compare:
            _print_side_by_side(answerer, prompt)
        else:
            _print_as_it_comes(answerer, prompt)


def _fields(answerer: Answerer, prompt: str, settings: GenerateSettings) -> dict[str, Any]:
    answers = {"prompt": prompt, "answer": "".join(answerer.answer(prompt))}
    if settings.compare:
        answers["base_answer"] = "".join(answerer.base_answer(prompt))
    return answers


def _print_as_it_comes(answerer: Answerer, prompt: str) -> None:
    for piece in answerer.answer(prompt):
        sys.stdout.write(_fit(piece))
        sys.stdout.flush()
    print()


def _print_side_by_side(answerer: Answerer, prompt: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, expand=True, show_edge=False, pad_edge=False)
    table.add_column("base model", ratio=1)
    table.add_column("with the adapter", ratio=1)
    answers = (answerer.base_answer(prompt), answerer.answer(prompt))
    texts = (_fit("".join(answer)).strip() for answer in answers)
    # What has no space to break at is broken anywhere, not cut off.
    table.add_row(*(Text(text, overflow="fold") for text in texts))
    Console(file=sys.stdout).print(table)


def _fit(text: str) -> str:
    return fit_for(sys.stdout, text.replace("\t", "    "))
