"""What PEFT writes and reads: the two files of a folder, the names in them, and the settings.

A folder has `adapter_config.json` beside `adapter_model.safetensors`. Keys are `base_model.model.`
and the name in the model; a block of MiSS ends with `.miss_block` (`.bone_block` up to PEFT 0.18),
the factors of a LoRA with `.lora_A.weight` and `.lora_B.weight`. PEFT calls a tile "mini".

The tensors say which layers are adapted, so the fields that select layers are not evaluated.
Source: PEFT 0.21; 0.18 for Bone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from disha.errors import (
    AdapterFileError,
    AdapterIOError,
    ArgumentError,
    ConversionError,
)
from disha.files.disk import PathLike, checked_path, save, save_tensors
from disha.text import first_few

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

PREFIX = "base_model.model."
"""PEFT's prefix of every name: its wrapper, and the model in it."""

THE_MODEL_ITSELF = "(the model): PEFT adapts layers within a model, not the model itself"

# --- both files ----------------------------------------------------------------------------------


def write_peft_files(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write both files. The configuration comes last, because PEFT looks for it first."""
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    if folder.is_file():
        raise ArgumentError(f"{folder} is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    prefixed = {PREFIX + key: tensor for key, tensor in tensors.items()}
    save_tensors(folder / WEIGHTS_NAME, prefixed, {"format": "pt"})
    save(folder / CONFIG_NAME, lambda new: new.write_text(text, encoding="utf-8"))


def read_peft_files(folder: PathLike) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """Return the folder's path, its configuration, and its tensors without `PREFIX`."""
    path = checked_path(folder)
    if (path / "adapter_model.bin").exists() and not (path / WEIGHTS_NAME).exists():
        raise AdapterFileError(
            f"{path} holds adapter_model.bin, a pickle, which can run any code; save it in PEFT as "
            "safetensors"
        )
    try:
        fields = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
        tensors = load_file(path / WEIGHTS_NAME)
    except OSError as error:
        raise AdapterIOError(f"can't read a folder of PEFT: {error}") from error
    except (SafetensorError, ValueError) as error:
        raise AdapterFileError(f"{path} is no complete folder of PEFT: {error}") from error
    return path, fields, {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}


def refuse_to_write(what: str, problems: Sequence[str]) -> None:
    """Raise `ConversionError` with all problems of an adapter, if there are any."""
    if problems:
        raise ConversionError(
            f"{what}, so nothing was written:\n{first_few(problems, 20)}\n"
            "Leave these layers out (`exclude`), or merge (merge_adapters)"
        )


def refuse_to_load(path: Path, problems: Sequence[str]) -> None:
    """Raise `AdapterFileError` with all problems of a folder, if there are any."""
    if problems:
        raise AdapterFileError(
            f"{path} can't be loaded with the same results as in PEFT; nothing changed:\n"
            + first_few(problems, 20)
        )


# --- names ---------------------------------------------------------------------------------------


def _name_ends(name: str) -> Iterator[str]:
    """Yield the name, and the rest of it after each dot."""
    parts = name.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


def has_saved(name: str, modules_to_save: Iterable[str]) -> bool:
    """Whether a tensor of that name is in a module that PEFT saves, at any depth."""
    # "head." is in the name if the name of a module around the tensor ends with "head".
    return any(f"{one}." in name for one in modules_to_save)


def is_inside(name: str, modules_to_save: Iterable[str]) -> bool:
    """Whether PEFT skips the layer of that name because it sees it as part of a saved module."""
    return any(f".{one}." in f".{name}." for one in modules_to_save)


def anchored(name: str) -> str:
    """Return the key of `rank_pattern` or `alpha_pattern` for this layer only."""
    return "^" + re.escape(name)


def of_layer(fields: Mapping[str, Any], name: str, field: str, pattern: str, default: Any) -> Any:
    """Return a setting of a layer as PEFT finds it: by the first key of the pattern that fits."""
    for key, value in (fields.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return fields.get(field, default)


def exact_targets(
    adapted: Iterable[str], modules: Collection[str] | None = None
) -> list[str] | str:
    r"""Return `target_modules` that select these layers: their full names.

    PEFT reads the entries of a list as endings of names. If they end the names of other modules
    too, or if the modules are unknown and a name is only a number, the result is a regex.

    Examples:
        >>> from disha.interop.peft_format import exact_targets
        >>> exact_targets(["0.q"], ["0", "0.q", "0.k", "1", "1.q", "1.k"])
        ['0.q']
        >>> exact_targets(["q", "v"], ["q", "v", "0", "0.q", "0.v"])
        'q|v'
    """
    wanted = set(adapted)
    if modules is None:
        is_exact = not any(map(str.isdecimal, wanted))
    else:
        selected = {one for one in modules if not wanted.isdisjoint(_name_ends(one))}
        is_exact = selected == wanted
    return sorted(wanted) if is_exact else "|".join(map(re.escape, sorted(wanted)))


# --- settings ------------------------------------------------------------------------------------

NOTES = ("base_model_name_or_path", "revision", "task_type")
"""Fields that say where an adapter belongs. They do not change what it computes."""

TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""The end of a model's class in `transformers` -> PEFT's name of its task."""


def notes_of(model: nn.Module) -> dict[str, str]:
    """Return the `NOTES` that the configuration of a model of `transformers` gives."""
    config: Any = getattr(model, "config", None)
    architecture = (getattr(config, "architectures", None) or [type(model).__name__])[0]
    tasks = [task for end, task in TASKS.items() if architecture.endswith(end)]
    if architecture.endswith("ForConditionalGeneration") and config.is_encoder_decoder:
        tasks.append("SEQ_2_SEQ_LM")
    found = {"base_model_name_or_path": getattr(config, "_name_or_path", None)}
    found["task_type"] = tasks[0] if tasks else None
    return {note: value for note, value in found.items() if value and isinstance(value, str)}


def names_in(fields: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return a field that is a list of names, or null."""
    return tuple(fields.get(name) or ())
