"""A base checkpoint on disk: one safetensors file, or a folder as Hugging Face writes it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disha.errors import (
    AdapterIOError,
)
from disha.files.disk import PathLike, checked_path, open_tensors
from disha.interop.experts import DOWN, FAMILIES, GATE_UP, SEPARATE_BEFORE, SINGLE_EXPERT, renamed

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

_FIRST_PARTS = {
    parts[0]: (family.block, last, parts)
    for family in FAMILIES.values()
    for last, parts in ((GATE_UP, (family.gate, family.up)), (DOWN, (family.down,)))
    if family.layout == SEPARATE_BEFORE
}
"""The first matrix of an expert's part of a stack -> the block, the stack, and all matrices."""

Stack = tuple[tuple[str, ...], ...]
"""For each expert, the tensors whose rows, one after the other, are its matrix (out, in)."""


@dataclass(frozen=True)
class Checkpoint:
    """A base checkpoint, opened but not read: the file of each tensor, and its stacks."""

    path: Path
    files: Mapping[str, Path]
    stacks: Mapping[str, Stack]

    def tensor(self, key: str) -> Tensor:
        """Return a tensor or a stack."""
        if key in self.stacks:
            return torch.stack(
                [torch.cat([*map(self.tensor, names)]) for names in self.stacks[key]]
            )
        with open_tensors(self.files[key]) as file:
            return file.get_tensor(key)

    def shape_and_dtype(self, key: str) -> tuple[tuple[int, ...], str]:
        """Return these of a tensor or a stack, the dtype as safetensors calls it."""
        if key in self.stacks:
            parts = [self.shape_and_dtype(name) for name in self.stacks[key][0]]
            (_, inputs), dtype = parts[0]
            outputs = sum(shape[0] for shape, _ in parts)
            return (len(self.stacks[key]), outputs, inputs), dtype
        with open_tensors(self.files[key]) as file:
            stored = file.get_slice(key)
            return tuple(stored.get_shape()), stored.get_dtype()

    def config(self) -> dict[str, Any]:
        """Return the content of config.json in the folder, or beside the file; {} if none."""
        path = (self.path if self.path.is_dir() else self.path.parent) / CONFIG
        return json.loads(path.read_bytes()) if path.is_file() else {}


def open_checkpoint(path: PathLike) -> Checkpoint:
    """Open a base checkpoint: a file, or a folder with one `model.safetensors` or an index."""
    path = checked_path(path)
    index = path / INDEX
    file = path / SINGLE if path.is_dir() else path
    if file == path or file.is_file():
        with open_tensors(file) as tensors:
            files = dict.fromkeys(tensors.keys(), file)
    elif index.is_file():
        shards = json.loads(index.read_bytes())["weight_map"]
        files = {name: path / shard for name, shard in shards.items()}
    else:
        raise AdapterIOError(
            f"{path} holds neither {SINGLE} nor {INDEX}; name a checkpoint of safetensors"
        )
    return Checkpoint(path, files, _stacks_of(files))


def _stacks_of(names: Collection[str]) -> dict[str, Stack]:
    """Return stack's name in the model -> the stack, for all experts that are stored one by one."""
    found: dict[str, dict[int, tuple[str, ...]]] = {}
    for name in names:
        match = SINGLE_EXPERT.fullmatch(name.removesuffix(".weight"))
        if match is None or match[3] not in _FIRST_PARTS:
            continue
        block, last, parts = _FIRST_PARTS[match[3]]
        stack = f"{renamed(match[1], block, 'mlp')}.{last}"
        found.setdefault(stack, {})[int(match[2])] = tuple(
            f"{match[1]}.{match[2]}.{part}.weight" for part in parts
        )
    return {
        stack: tuple(experts[number] for number in sorted(experts))
        for stack, experts in found.items()
        if stack not in names  # else it is stored as one tensor too
        and max(experts) < len(experts)
        and all(name in names for rows in experts.values() for name in rows)
    }
