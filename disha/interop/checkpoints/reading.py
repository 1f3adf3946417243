"""A base checkpoint on disk: one safetensors file, or a folder as Hugging Face libraries write it.

Opening it reads headers only. Each tensor is read on request. No content is trusted: an index can't
name a file outside the folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from disha.errors import AdapterFileError, AdapterIOError
from disha.files.atomic import PathLike, checked_path, resolved
from disha.files.json_files import read_json
from disha.files.reading import explained, found_at, walked
from disha.files.tensors import LARGEST_INDEX, Index, StoredTensor, TensorFile, opened
from disha.text import brief

__all__ = [
    "CONFIG",
    "INDEX",
    "SINGLE",
    "Checkpoint",
    "may_tie",
    "open_checkpoint",
    "vocabulary_sizes",
]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHTS = (
    *PICKLES,
    *(".safetensors", ".index.json", ".gguf", ".onnx", ".onnx_data"),
    *(".h5", ".msgpack", ".ot", ".npz", ".tflite"),
)
"""Endings of the names of weight files and their indexes. They are not merged, so not copied."""

SHARD = re.compile(r"[^/\\\0]+\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A base checkpoint, opened but not read.

    Attributes:
        path: the file or the folder.
        files: its safetensors files.
        tensors: name -> where the tensor is, and its shape and dtype.
        indexes: what each file says about itself.
        index: the index without its list of names, or None if there is no index.

    Examples:
        >>> import tempfile, pathlib
        >>> import torch
        >>> from safetensors.torch import save_file
        >>> from disha.interop.checkpoints import open_checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"0.weight": torch.ones(2, 3)}, pathlib.Path(folder, "model.safetensors"))
        ...     checkpoint = open_checkpoint(folder)
        ...     float(checkpoint.tensor("0.weight").sum())
        6.0
        >>> checkpoint.nbytes, checkpoint.index
        (24, None)
    """

    path: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, StoredTensor]
    indexes: Mapping[Path, Index]
    index: Mapping[str, Any] | None

    @property
    def folder(self) -> Path | None:
        """The folder, or None if the checkpoint is one file."""
        return None if self.files == (self.path,) else self.path

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(stored.nbytes for stored in self.tensors.values())

    def tensor(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Return a tensor.

        Args:
            name: its name, one of `tensors`.
            first: the first row to read.
            last: the row after the last one to read; all rows by default.

        Raises:
            AdapterIOError: its file can't be read any more, or has changed, or there is no memory
                for the tensor.
            AdapterFileError: its dtype is unknown.
        """
        with self.file_of(name) as file:
            return file.read(name, first, last)

    def file_of(self, name: str) -> AbstractContextManager[TensorFile]:
        """Open the file of a tensor.

        Args:
            name: the tensor's name, one of `tensors`.

        Returns:
            A context that gives the open file.

        Raises:
            AdapterIOError: it can't be read any more, or has changed.
        """
        path = self.tensors[name].path
        return opened(path, self.indexes[path])

    def config(self) -> dict[str, Any]:
        """Return the content of config.json in the folder, or beside the file; {} if none."""
        path = (self.folder or self.path.parent) / CONFIG
        return read_json(path) if found_at(path) else {}

    def other_files(self) -> tuple[dict[str, Path], set[str]]:
        """Return the files beside the weights, by name, and the names of those that stay out.

        Weights in other formats, hidden files, and links that lead out of the folder do not belong
        in a copy of the checkpoint.

        Raises:
            AdapterIOError: the folder can't be read.
        """
        copied: dict[str, Path] = {}
        left_out: set[str] = set()
        if self.folder is None:
            return copied, left_out
        written = {*(file.name for file in self.files)} | ({INDEX} if self.index else set())
        with explained(self.folder):
            for parent, folders, files in walked(self.folder):
                below = Path(parent).relative_to(self.folder)
                for name in [*folders]:
                    if name.startswith(".") or os.path.islink(Path(parent, name)):
                        left_out.add(f"{(below / name).as_posix()}/")
                        folders.remove(name)
                for name in files:
                    path, relative = Path(parent, name), (below / name).as_posix()
                    if _is_copied(path, self.folder):
                        copied[relative] = path
                    elif relative not in written:
                        left_out.add(relative)
        return copied, left_out


def _is_copied(path: Path, folder: Path) -> bool:
    """Whether a file beside the weights belongs in a copy of the checkpoint."""
    if path.name.startswith(".") or path.name.lower().endswith(WEIGHTS):
        return False
    if found_at(path) != "file":
        return False
    # A link can point to any file of this machine, which must not be published with the weights.
    # In the cache of huggingface_hub, all files are links to blobs.
    home, target = resolved(folder), resolved(path)
    blobs = home.parent.parent / "blobs"
    return home in target.parents or blobs in target.parents


def open_checkpoint(path: PathLike) -> Checkpoint:
    """Open a base checkpoint without reading its tensors.

    Args:
        path: one safetensors file; or a folder with a `model.safetensors`, or with shards and a
            `model.safetensors.index.json`.

    Returns:
        A `Checkpoint` with names, shapes and dtypes. It reads each tensor on request.

    Raises:
        AdapterIOError: it, or a shard that its index names, can't be read or does not exist.
        AdapterFileError: it is damaged, its weights are pickles, its index and its shards
            disagree, or the index names a file outside the folder or a tensor twice.

    Examples:
        >>> import tempfile, pathlib
        >>> import torch
        >>> from safetensors.torch import save_file
        >>> from disha.interop.checkpoints import open_checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "model.safetensors")
        ...     save_file({"0.weight": torch.zeros(2, 3)}, path)
        ...     checkpoint = open_checkpoint(folder)
        >>> checkpoint.tensors["0.weight"].shape
        (2, 3)
    """
    path = checked_path(path)
    if found_at(path) != "folder":
        return _single(path, path)
    if found_at(path / SINGLE):  # first, as transformers looks for it
        return _single(path, path / SINGLE)
    if found_at(path / INDEX):
        return _sharded(path)
    with explained(path):
        pickled = sorted(one.name for one in path.iterdir() if one.suffix in PICKLES)
    if pickled:
        raise AdapterFileError(
            f"{path} holds its weights as {pickled[0]}, a pickle, which can run any code when it "
            "is read; get the safetensors version, or write one with save_pretrained of "
            "transformers where you trust the file"
        )
    raise AdapterIOError(
        f"{path} holds neither {SINGLE} nor {INDEX}; name the folder that does, or a .safetensors "
        "file itself"
    )


def _single(path: Path, file: Path) -> Checkpoint:
    if file.suffix in PICKLES:
        raise AdapterFileError(
            f"{file} has the name of a pickle, and a pickle can run any code when it is read; get "
            "the safetensors version of the checkpoint"
        )
    index = _index_of(file)
    return Checkpoint(path, (file,), index.tensors, {file: index}, index=None)


def _sharded(folder: Path) -> Checkpoint:
    path = folder / INDEX
    index = read_json(path, LARGEST_INDEX)
    weight_map = index.pop("weight_map", None)
    if not isinstance(weight_map, dict) or not weight_map:
        raise AdapterFileError(
            f"{path}: weight_map must map names of tensors to files, and maps none"
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not SHARD.fullmatch(shard):
            raise AdapterFileError(
                f"{path}: the file of {name!r} is {brief(shard)}; allowed are names of "
                ".safetensors files in the same folder"
            )
    files = tuple(folder / name for name in sorted(set(weight_map.values())))
    tensors: dict[str, StoredTensor] = {}
    indexes = {}
    for file in files:
        indexes[file] = _index_of(file)
        held = indexes[file].tensors
        for name in held:
            if weight_map.get(name) != file.name:
                said = f"is in {weight_map[name]}" if name in weight_map else "does not exist"
                raise AdapterFileError(
                    f"{file} holds {name!r}, which {said} according to {INDEX}; get the folder "
                    "again"
                )
        tensors.update(held)
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise AdapterFileError(
            f"{path}: {missing[0]!r} is not in {weight_map[missing[0]]} ({len(missing)} such "
            "tensors); get the folder again"
        )
    return Checkpoint(folder, files, tensors, indexes, index)


def may_tie(config: Mapping[str, Any]) -> bool:
    """Whether the model of a config.json may tie its embeddings.

    Models tie them by default. A config.json without a model type belongs to no such model.

    Args:
        config: the content of the file.
    """
    ties = [one["tie_word_embeddings"] for one in _parts(config) if "tie_word_embeddings" in one]
    return any(one is not False for one in ties) or (not ties and "model_type" in config)


def vocabulary_sizes(config: Mapping[str, Any]) -> set[int]:
    """Return how many rows the embeddings of a model can have, by its config.json.

    Args:
        config: the content of the file.
    """
    sizes = (one.get("vocab_size") for one in _parts(config))
    return {size for size in sizes if isinstance(size, int)}


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return a configuration, and those in it, such as of the language model in a larger one."""
    return [config, *(part for part in config.values() if isinstance(part, dict))]


def _index_of(path: Path) -> Index:
    with opened(path) as file:
        return file.index
