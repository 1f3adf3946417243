"""What an adapter file notes for the commands, and how they load it.

| note | what it holds |
|---|---|
| `base` | the base, and how it was held in memory, as JSON |
| `chat_template` | a template that is not the base's |
| `new_tokens` | the tokens that were added to the base, as JSON |
| `eos_token` | the token that ends answers, if it is not the base's |
| `prompt` | `chat` if the adapter was asked by the template, `text` if not |

A path of a base begins with a dot and is relative to the folder of the adapter file, so that both
can be moved together. Any other text is a name. A folder of PEFT has these notes in files: the base
in `adapter_config.json`, the template and the tokens in files of the tokenizer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import disha
from disha.errors import AdapterFileError, ArgumentError
from disha.files import ADAPTER_NAME, file_at
from disha.finetune.flags import BITS

BASE_KEY = "base"
TEMPLATE_KEY = "chat_template"
TOKENS_KEY = "new_tokens"
EOS_KEY = "eos_token"
PROMPT_KEY = "prompt"
TEMPLATE_NAME = "chat_template.jinja"  # the file that transformers reads a template from


def read_notes(adapter: str | Path) -> dict[str, str]:
    """Return the notes of an adapter; those of a folder of PEFT are the files in it."""
    folder = disha.interop.peft.find_folder(adapter)
    if folder is None:
        return dict(disha.inspect_adapter(adapter).metadata)
    try:
        return _read_folder(folder)
    except disha.DishaError:
        raise
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise AdapterFileError(
            f"{folder} has notes that can't be read ({error}); get it again"
        ) from error


def _read_folder(folder: Path) -> dict[str, str]:
    """Return the notes in the files of a folder of PEFT."""
    notes = {}
    base = disha.interop.peft.read_config(folder).get("base_model_name_or_path")
    if base and isinstance(base, str):
        notes[BASE_KEY] = base_note(base, "fp32", folder / ADAPTER_NAME)
    template = folder / TEMPLATE_NAME
    if template.is_file():
        notes[TEMPLATE_KEY] = template.read_text(encoding="utf-8")
    tokenizer = folder / "tokenizer.json"
    if tokenizer.is_file():  # the base has most of its tokens already, in the same order
        added = json.loads(tokenizer.read_bytes())["added_tokens"]
        notes[TOKENS_KEY] = json.dumps([token["content"] for token in added])
    return notes


def read_settings(adapter: str | Path) -> dict[str, Any]:
    """Return what an adapter sets, as the flags of `disha finetune` would say it."""
    folder = disha.interop.peft.find_folder(adapter)
    if folder is not None:
        fields = disha.interop.peft.read_config(folder)
        method = "bat" if fields.get("init_weights") == "bat" else "bone"
        if fields.get("peft_type") == "LORA":
            method = "lora"
        return {"r": fields.get("r"), "method": method, "target": [], "new_tokens": []}
    file = disha.inspect_adapter(adapter)
    config = file.config
    target = config.target or ()  # a combined adapter has none
    method, _, groups = config.method.partition("_groups")
    return {
        "r": config.r,
        "r_out": config.r_out,
        "method": method,
        "groups": groups.strip("_") or "1",
        "target": [target] if isinstance(target, str) else [*target],
        "exclude": [*config.exclude],
        "rank_pattern": [f"{pattern}={r}" for pattern, r in config.rank_pattern.items()],
        "dropout": config.dropout,
        "scale": config.scale,
        "also_train": [*config.also_train],
        "new_tokens": read_noted_tokens(file.metadata),
    }


def read_noted_tokens(notes: Mapping[str, str]) -> list[str]:
    """Return the tokens that an adapter has added to its base."""
    try:
        tokens = json.loads(notes.get(TOKENS_KEY, "[]"))
    except (ValueError, RecursionError):
        tokens = None
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise AdapterFileError(
            f"the note {TOKENS_KEY} of the adapter is no list of tokens; get the file again"
        )
    return tokens


def base_note(name: str, bits: str, adapter: Path) -> str:
    """Return the note of a base for an adapter file."""
    path = Path(name)
    if os.path.exists(name):
        try:
            relative = os.path.relpath(path.absolute(), adapter.parent.resolve())
            name = f"./{Path(relative).as_posix()}"
        except ValueError:  # another drive of Windows
            name = str(path.absolute())
    return json.dumps({"base_model_name_or_path": name, "bits": bits})


def read_noted_base(adapter: str | Path, notes: Mapping[str, str]) -> str:
    """Return the base that an adapter has in its notes."""
    name = _noted(notes).get("base_model_name_or_path")
    if not isinstance(name, str):
        raise ArgumentError(f"{adapter} notes no base that can be used; name it too")
    if name.startswith("./"):
        name = os.path.normpath(file_at(adapter).parent.resolve() / name)
        if not os.path.exists(name):
            raise ArgumentError(f"{adapter} notes the base {name}, which is not there; give --base")
    return name


def read_noted_bits(notes: Mapping[str, str]) -> str:
    """Return how notes say that the base was held in memory; if they do not, in float32."""
    bits = _noted(notes).get("bits")
    return bits if bits in BITS else "fp32"


def _noted(notes: Mapping[str, str]) -> dict[str, Any]:
    """Return what is noted of the base; nothing if that is no JSON object."""
    try:
        note = json.loads(notes.get(BASE_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    return note if isinstance(note, dict) else {}
