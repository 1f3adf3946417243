"""For commands that take the base model from the note in an adapter file, if no flag names one."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from disha.cli.flags import parsed
from disha.finetune.noted_base import noted_base
from disha.finetune.settings import EvaluateSettings, GenerateSettings, ModelSettings
from disha.text import printable

__all__ = ["base_of", "parsed_with_base"]

T = TypeVar("T", GenerateSettings, EvaluateSettings)


def parsed_with_base(
    kind: type[T], name: str, arguments: Sequence[str], description: str
) -> tuple[T, AbstractContextManager[None]]:
    """Return the settings of a command, and a context for its work.

    If the note names the base model, the context refuses an adapter of another base.

    Args:
        kind: the class of the settings.
        name: the command's name.
        arguments: the words after it.
        description: the start of the help.
    """
    settings = parsed(kind, name, arguments, description, kind())
    adapter = settings.adapter
    model = None if adapter is None or settings.model.is_named else base_of(adapter)
    if model is None:
        return settings, nullcontext()
    from disha.finetune.adapting import refusing_other_base

    noted = replace(kind(), model=model)
    return parsed(kind, name, arguments, description, noted), refusing_other_base()


def base_of(adapter: Path) -> ModelSettings | None:
    """Return the base that an adapter file notes, and print which it is; None without a note."""
    found = noted_base(adapter)
    if found is not None and os.environ.get("RANK", "0") == "0":
        near = os.path.relpath(found.base_model)
        base = found.base_model if near.startswith(os.pardir) else near
        said = f"the base model is {base}, with --bits {found.bits}, as {adapter} notes"
        print(printable(said, len(said)), file=sys.stderr)
    return found
