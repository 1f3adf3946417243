"""A base checkpoint on disk: one safetensors file, or a folder as Hugging Face writes it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from disha.errors import AdapterFileError, AdapterIOError
from disha.files.disk import PathLike, check_path, open_tensors, read_json
from disha.interop.experts import (
    DOWN,
    FAMILIES,
    GATE_UP,
    JOINED,
    SINGLE_EXPERT,
    replace_part,
)
from disha.layers.fingerprints import fingerprint
from disha.text import brief

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"


class ExpertMatrices(NamedTuple):
    """Matrices of an expert whose rows `transformers` joins into the expert's part of a stack."""

    stack: str
    parent: str  # the module around the experts, as in names of single experts
    matrices: tuple[str, ...]


def _list_expert_matrices() -> dict[str, ExpertMatrices]:
    """Return the matrices that are joined, by the name of the first of them in its expert."""
    by_first = {}
    for family in FAMILIES.values():
        if family.layout == JOINED:
            pair = ExpertMatrices(GATE_UP, family.parent, (family.gate, family.up))
            by_first[family.gate] = pair
            by_first[family.down] = ExpertMatrices(DOWN, family.parent, (family.down,))
    return by_first


EXPERT_MATRICES = _list_expert_matrices()

Stack = tuple[tuple[str, ...], ...]
"""For each expert, the tensors whose rows, one after the other, are its matrix (out, in)."""


@dataclass(frozen=True)
class Checkpoint:
    """A base checkpoint; its tensors are read when they are asked for.

    Experts that are stored one by one have the name of their stack in the model too.
    """

    path: Path
    files: Mapping[str, Path]  # tensor -> the file that holds it
    stacks: Mapping[str, Stack]

    def tensor(self, key: str) -> Tensor:
        """Return a tensor or a stack."""
        if key not in self.stacks:
            with open_tensors(self.files[key]) as file:
                return file.get_tensor(key)
        experts = []
        for names in self.stacks[key]:
            experts.append(torch.cat([self.tensor(name) for name in names]))
        return torch.stack(experts)

    @cached_property
    def keys_by_values(self) -> Mapping[str | None, Sequence[str]]:
        """The tensors with the same values, by the fingerprint of these."""
        keys = defaultdict[str | None, list[str]](list)
        for key in self.files:
            keys[fingerprint(self.tensor(key))].append(key)
        return keys

    def config(self) -> dict[str, Any]:
        """Return the content of config.json, in the folder or beside the file; {} without one."""
        folder = self.path if self.path.is_dir() else self.path.parent
        config = folder / CONFIG
        if not config.is_file():
            return {}
        return read_json(config)


def ties_embeddings(config: Mapping[str, Any]) -> bool | None:
    """Whether a model ties its embeddings, as its configuration says or one nested in it.

    None if they do not say, and are not of `transformers`, whose default is to tie.
    """
    key = "tie_word_embeddings"
    parts = [config, *config.values()]
    answers = [part[key] for part in parts if isinstance(part, dict) and key in part]
    if answers:
        return any(answers)
    return True if "model_type" in config else None


def open_checkpoint(path: PathLike) -> Checkpoint:
    """Open a base checkpoint: a file, or a folder with a `model.safetensors` or an index."""
    path = check_path(path)
    single = path / SINGLE
    index = path / INDEX
    if not path.is_dir() and path.suffix != ".gguf":
        files = _names_in(path)
    elif single.is_file():
        files = _names_in(single)
    elif index.is_file():
        files = {name: path / shard for name, shard in _shards_in(index).items()}
    else:
        raise AdapterIOError(
            f"{path} holds neither {SINGLE} nor {INDEX}; name a checkpoint of safetensors"
        )
    return Checkpoint(path, files, _find_stacks(files))


def _shards_in(index: Path) -> dict[str, str]:
    """Return the name of each tensor -> the name of its file, which must be in the folder too."""
    shards = read_json(index).get("weight_map", {})
    names = shards.values() if isinstance(shards, dict) else [None]
    for name in names:
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
            raise AdapterFileError(
                f"{index} has {brief(name)} where the name of a file should be; get it again"
            )
    return dict(shards)


def _names_in(file: Path) -> dict[str, Path]:
    with open_tensors(file) as tensors:
        return dict.fromkeys(tensors.keys(), file)


def _find_stacks(names: Collection[str]) -> dict[str, Stack]:
    """Return the stacks of all experts that are stored one by one, by their names in the model."""
    stacks: dict[str, dict[int, tuple[str, ...]]] = {}
    for name in names:
        match = SINGLE_EXPERT.fullmatch(name.removesuffix(".weight"))
        if match is None:
            continue
        experts, number, matrix = match.groups()
        if matrix not in EXPERT_MATRICES:
            continue
        expert = EXPERT_MATRICES[matrix]
        stack = f"{replace_part(experts, expert.parent, 'mlp')}.{expert.stack}"
        tensors = tuple(f"{experts}.{number}.{part}.weight" for part in expert.matrices)
        stacks.setdefault(stack, {})[int(number)] = tensors
    complete = {}
    for stack, numbered in stacks.items():
        tensors = tuple(name for expert in numbered.values() for name in expert)
        has_all_experts = max(numbered) < len(numbered)
        has_all_tensors = all(name in names for name in tensors)
        if has_all_experts and has_all_tensors and stack not in names:
            complete[stack] = tuple(numbered[number] for number in sorted(numbered))
    return complete
