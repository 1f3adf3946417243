"""What an adapter file notes for the commands, and how they load it.

| note | what it holds |
|---|---|
| `base` | the base, and how it was held in memory, as JSON |
| `chat_template` | a template that is not the base's |
| `new_tokens` | the tokens that were added to the base, as JSON |
| `eos_token` | the token that ends answers, if it is not the base's |
| `prompt` | `chat` if the adapter was asked by the template, `text` if not |

A path of a base begins with a dot and is relative to the folder of the adapter file, so that both
can be moved together. Any other text is a name. A folder of PEFT's MiSS names its base only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

import disha
from disha.errors import AdapterFileError, ArgumentError
from disha.files import ADAPTER_NAME
from disha.text import brief

BASE_KEY = "base"
TEMPLATE_KEY = "chat_template"
TOKENS_KEY = "new_tokens"
EOS_KEY = "eos_token"
PROMPT_KEY = "prompt"
TEMPLATE_NAME = "chat_template.jinja"  # the file that transformers reads a template from

PEFT_CONFIG = "adapter_config.json"
"""The file that tells a folder of PEFT from others."""

FEW_BITS = ("8", "4")
BITS = ("bf16", "fp16", "fp32", *FEW_BITS)
"""How a base can be held in memory."""


def read_notes(adapter: str | Path) -> dict[str, str]:
    """Return the notes in an adapter file; a folder of PEFT has none."""
    if _is_peft_folder(adapter):
        return {}
    return dict(disha.inspect_adapter(adapter).metadata)


def read_settings(adapter: str | Path) -> dict[str, Any]:
    """Return what an adapter sets: its configuration, and the tokens that it has added."""
    if _is_peft_folder(adapter):
        settings = _peft_settings(adapter)
        method = "bat" if settings.get("init_weights") == "bat" else "bone"
        return {"r": settings.get("r"), "method": method, "new_tokens": []}
    file = disha.inspect_adapter(adapter)
    return {**file.config.to_json(), "new_tokens": read_noted_tokens(file.metadata)}


def load_noted_adapter(model: nn.Module, adapter: str | Path) -> None:
    """Load an adapter file, or a folder of PEFT's MiSS, into a model."""
    if _is_peft_folder(adapter):
        disha.interop.peft.load(model, adapter)
    else:
        disha.load_adapter(model, adapter)


def _is_peft_folder(adapter: str | Path) -> bool:
    folder = Path(adapter)
    return (folder / PEFT_CONFIG).is_file() and not (folder / ADAPTER_NAME).exists()


def _peft_settings(folder: str | Path) -> dict[str, Any]:
    path = Path(folder, PEFT_CONFIG)
    settings = json.loads(path.read_bytes())
    if not isinstance(settings, dict):
        raise AdapterFileError(f"{path} must hold a JSON object")
    return settings


def read_noted_tokens(notes: Mapping[str, str]) -> list[str]:
    """Return the tokens that an adapter has added to its base."""
    try:
        tokens = json.loads(notes.get(TOKENS_KEY, "[]"))
    except (ValueError, RecursionError):
        tokens = None
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise AdapterFileError(
            f"the adapter's note {TOKENS_KEY} is not a JSON list of texts: "
            f"{brief(notes[TOKENS_KEY])}; get its file again"
        )
    return tokens


def is_gguf(name: str) -> bool:
    """Return whether a base is a GGUF file."""
    return name.lower().endswith(".gguf")


def base_note(name: str, bits: str, adapter: Path) -> str:
    """Return the note of a base for an adapter file."""
    path = Path(name)
    if path.exists():
        try:
            relative = os.path.relpath(path.absolute(), adapter.parent.resolve())
            name = f"./{Path(relative).as_posix()}"
        except ValueError:  # another drive of Windows
            name = str(path.absolute())
    return json.dumps({"base_model_name_or_path": name, "bits": bits})


def notes_at(path: Path, notes: Mapping[str, str], base: str, bits: str) -> dict[str, str]:
    """Return the notes for an adapter file at a path: those given, and that of its base."""
    return {**notes, BASE_KEY: base_note(base, bits, path)}


def read_noted_base(adapter: str | Path) -> tuple[str, str]:
    """Return the base that an adapter notes, and its bits."""
    if _is_peft_folder(adapter):
        name = _peft_settings(adapter).get("base_model_name_or_path")
        if not name:
            raise ArgumentError(f"{adapter} notes no base that can be used; name it too")
        return name, "fp32"
    file = disha.inspect_adapter(adapter)
    adapter = file.path
    try:
        note = json.loads(file.metadata[BASE_KEY])
        name = note["base_model_name_or_path"]
        bits = note.get("bits", "fp32")
        is_path = name.startswith("./")
        BITS.index(bits)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArgumentError(f"{adapter} notes no base that can be used; name it too") from error
    if not is_path:
        return name, bits
    path = Path(os.path.normpath(adapter.parent.resolve() / name))
    if not path.exists():
        raise ArgumentError(f"{adapter} notes the base {path}, which is not there; give --base")
    return str(path), bits
