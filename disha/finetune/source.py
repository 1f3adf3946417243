"""Where a base is: a folder, a GGUF file, or a name that a hub knows (`name@revision`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from disha.errors import ArgumentError


def is_gguf(name: str) -> bool:
    """Return whether a base is a GGUF file."""
    return name.lower().endswith(".gguf")


def source_of(name: str) -> tuple[str, dict[str, Any]]:
    """Return the folder or name that `from_pretrained` takes for a base, and its options."""
    options: dict[str, Any] = {"trust_remote_code": False}  # else transformers asks on a terminal
    if "@" in name and not Path(name).exists():
        name, _, options["revision"] = name.rpartition("@")
    if not is_gguf(name):
        return name, options
    path = Path(name)
    options["gguf_file"] = path.name
    return str(path.parent), options


@contextmanager
def explain_loading(name: str) -> Iterator[None]:
    """Name what could not be loaded in an error of `transformers`."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        raise ArgumentError(f"can't load {name}: {error}") from error
