"""The doors through which files of strangers come in, each tried in a process with limits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from disha.finetune.answering import prompts_of
from disha.finetune.data.dataset import open_rows
from disha.finetune.models.checkpoint import open_model
from disha.finetune.models.gguf import GGUFCheckpoint
from disha.finetune.settings import GenerateSettings
from disha.finetune.text.from_folder import open_tokenizer
from disha.finetune.text.from_gguf import tokenizer_from_gguf

import disha
from disha.cli import convert, finetune
from tests.fuzzing.limits import Usage, limit_process, limited_to

__all__ = ["DOORS", "MEMORY", "refusal"]

SECONDS = 10.0
"""Of processor time, where two are promised, as machines that run tests are slow and busy."""

MEMORY = 500_000_000

DOORS: Mapping[str, Callable[[Path], object]] = {
    "adapter": disha.inspect_adapter,
    "convert": lambda path: convert.run([str(path), str(path.with_name("out")), "--to", "disha"]),
    "checkpoint": disha.interop.checkpoints.open_checkpoint,
    "base model": lambda path: open_model(path).config(),
    "tokenizer": open_tokenizer,
    "tokenizer of GGUF": lambda path: tokenizer_from_gguf(GGUFCheckpoint(path).fields, path),
    "--config": lambda path: finetune.settings_from(["--config", str(path)]),
    "--prompt_file": lambda path: prompts_of(GenerateSettings(prompt_file=path)),
    "data": lambda path: list(open_rows(path, "train")),
}
"""Name of a door -> what opens a path there."""


def refusal(door: str, path: Path) -> str:
    """Return the message of the error that a path is refused with; "" if it is not.

    Call it in a process that may die of it.
    """
    limit_process(sys.stderr)
    try:
        with limited_to(SECONDS, MEMORY, Usage()):
            DOORS[door](path)
    except disha.DishaError as error:
        return str(error)
    return ""
