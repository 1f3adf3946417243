"""Writing a checkpoint with an adapter in its weights, one tensor after the other.

Every merged weight is what `merge_adapters` makes of it in memory, bit for bit; every other tensor
is copied as bytes. So what is in memory is one tensor, and the adapter.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from disha import functional
from disha.errors import MergeError
from disha.files.header import AdapterFile, LayerRecord
from disha.files.json_files import read_json
from disha.files.pieces import Piece, StoredTensor, copy_tensor, write_pieces, write_tensor
from disha.files.tensors import DTYPES
from disha.functional.shards import merge_dtype
from disha.interop.checkpoints.reading import CONFIG, INDEX, SINGLE, Checkpoint
from disha.interop.checkpoints.verifying import Matching
from disha.state import finite_as

__all__ = ["SUFFIX", "Progress", "Work", "fill_folder", "merged_metadata"]

SUFFIX = ".safetensors"

WEIGHTS = (
    *(SUFFIX, ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".h5", ".msgpack", ".onnx", ".ot"),
    *(".onnx_data", ".npz", ".tflite", ".index.json"),
)
"""How files end that hold weights, or say which files do: the unmerged ones are not copied."""

Progress = Callable[[int, int], None]
"""Called with the bytes of tensors that are written, and with those that will be."""


class Work:
    """What is to be done to each tensor of a checkpoint, and how much of it is done.

    Args:
        checkpoint: the base.
        adapter: the header of the adapter.
        tensors: its tensors.
        found: where they go.
        scale: the scale that is used instead of the adapter's.
        dtype: the dtype that floating-point tensors get.
        progress: shows how much is written.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        adapter: AdapterFile,
        tensors: Mapping[str, Tensor],
        found: Matching,
        scale: float | None,
        dtype: torch.dtype | None,
        progress: Progress | None,
    ) -> None:
        self.checkpoint, self.dtype = checkpoint, dtype
        self._tensors, self._scale, self._progress = tensors, scale, progress
        self._values = {key: tensors[name] for name, key in found.keys.items()}
        self._layers: dict[str, list[LayerRecord]] = {}
        for record in adapter.layers:
            self._layers.setdefault(found.weights[record.name], []).append(record)
        self._done = 0
        self.sizes = {name: self._piece(name).nbytes for name in checkpoint.tensors}
        self.total = sum(self.sizes.values())

    def write(self, names: Iterable[str], metadata: Mapping[str, str], path: str) -> None:
        """Write some of the tensors to a file."""
        write_pieces(path, {name: self._piece(name) for name in names}, metadata)

    def _piece(self, name: str) -> Piece:
        stored = self.checkpoint.tensors[name]
        dtype = self._dtype_of(stored)
        changed = name in self._layers or name in self._values or dtype != stored.dtype
        nbytes = stored.nbytes
        if dtype != stored.dtype:
            nbytes = math.prod(stored.shape) * DTYPES[dtype].itemsize

        def write(file: BinaryIO) -> None:
            if changed:
                write_tensor(self._changed(name, DTYPES[dtype]), file)
            else:
                copy_tensor(stored, file)
            self._done += nbytes
            if self._progress is not None:
                self._progress(self._done, self.total)

        return Piece(dtype, stored.shape, nbytes, write)

    def _dtype_of(self, stored: StoredTensor) -> str:
        """Return the dtype that a tensor will have, as files name it."""
        if self.dtype is None or stored.dtype not in DTYPES:
            return stored.dtype
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    def _changed(self, name: str, dtype: torch.dtype) -> Tensor:
        value = self.checkpoint.tensor(name)
        if name in self._values:
            value = self._values[name].to(value.dtype)
        if name not in self._layers:
            return _cast(name, value, dtype)
        # A copy: a file aligns its tensors as it likes, and libraries of linear algebra promise the
        # same bits for data that is aligned alike only.
        weight = value.to(merge_dtype(value.dtype), copy=True)
        del value
        merged = self._merged(self._layers[name], weight).to(dtype)
        if not finite_as(merged, dtype):
            names = ", ".join(repr(record.name) for record in self._layers[name])
            raise MergeError(
                f"merging {names} into {name} gives values that are not finite in {dtype}; nothing "
                "was written. Check the adapter's blocks and its scale, and the base"
            )
        return merged

    def _merged(self, records: Iterable[LayerRecord], weight: Tensor) -> Tensor:
        """Return W + sum of s dW: exactly what `merge_adapters` computes before it rounds."""
        deltas = (
            (
                functional.delta_weight(
                    one.method, one.layout, self._tensors[one.key], weight, one.rows
                ),
                one.scale if self._scale is None else self._scale,
            )
            for one in records
        )
        with functional.without_autocast(weight.device), torch.no_grad():
            return functional.merged_weight(weight, deltas)


def _cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    cast = value.to(dtype)
    if not finite_as(cast, dtype) and bool((value.isfinite() & ~cast.isfinite()).any()):
        raise MergeError(
            f"{name} has values that are not finite in {dtype}; nothing was written. Choose "
            "another dtype, or leave it out"
        )
    return cast


# --- files ---------------------------------------------------------------------------------------


def merged_metadata(checkpoint: Checkpoint, *files: Path) -> dict[str, str]:
    """Return the metadata for what was in these files, or in all; loaders look for a format."""
    found = {"format": "pt"}
    for file in files or checkpoint.files:
        found.update(checkpoint.metadata[file])
    return found


def fill_folder(folder: Path, work: Work) -> tuple[set[str], set[str]]:
    """Write the whole checkpoint into an empty folder; return the names written and left out."""
    checkpoint = work.checkpoint
    others, left_out = _other_files(checkpoint)
    for name, source in others.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _copy(source, work.dtype, folder / name)
    written = set(others)
    for file in checkpoint.files:
        name = SINGLE if checkpoint.folder is None else file.name
        held = [key for key, stored in checkpoint.tensors.items() if stored.path == file]
        metadata = merged_metadata(checkpoint, file)
        work.write(held, metadata, str(folder / name))
        written.add(name)
    if checkpoint.index is not None:
        _write_json(_index(checkpoint.index, work), folder / INDEX)
        written.add(INDEX)
    return written, left_out


def _index(former: Mapping[str, Any], work: Work) -> dict[str, Any]:
    metadata = former.get("metadata")
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    metadata["total_size"] = work.total
    if work.dtype is not None:
        metadata = _with_dtype(metadata, work.dtype)
    tensors = work.checkpoint.tensors
    weight_map = {name: tensors[name].path.name for name in sorted(tensors)}
    return {**former, "metadata": metadata, "weight_map": weight_map}


def _other_files(checkpoint: Checkpoint) -> tuple[dict[str, Path], set[str]]:
    """Return what else is to be copied from the folder, by name, and the names of what is not."""
    copied: dict[str, Path] = {}
    left_out: set[str] = set()
    if checkpoint.folder is None:
        return copied, left_out
    written = {*(file.name for file in checkpoint.files)} | ({INDEX} if checkpoint.index else set())
    for parent, folders, files in os.walk(checkpoint.folder):
        below = Path(parent).relative_to(checkpoint.folder)
        for name in [*folders]:
            if name.startswith(".") or (Path(parent) / name).is_symlink():
                left_out.add(f"{(below / name).as_posix()}/")
                folders.remove(name)
        for name in files:
            path, relative = Path(parent, name), (below / name).as_posix()
            if _is_copied(path, checkpoint.folder):
                copied[relative] = path
            elif relative not in written:
                left_out.add(relative)
    return copied, left_out


def _is_copied(path: Path, folder: Path) -> bool:
    """Whether a file beside the weights belongs into the merged checkpoint."""
    if path.name.startswith(".") or path.name.lower().endswith(WEIGHTS) or not path.is_file():
        return False
    # A link may lead to anything on this machine, which is not to be published with the weights;
    # in the cache of huggingface_hub all files are links, to blobs.
    home = Path(os.path.realpath(folder))
    target = Path(os.path.realpath(path))
    blobs = home.parent.parent / "blobs"
    return home in target.parents or blobs in target.parents


def _copy(source: Path, dtype: torch.dtype | None, path: Path) -> None:
    if source.name == CONFIG and dtype is not None:
        _write_json(_with_dtype(read_json(source), dtype), path)
    else:
        shutil.copyfile(source, path)


def _with_dtype(fields: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return a configuration that names another dtype wherever it, or a part of it, names one."""
    name = str(dtype).removeprefix("torch.")
    changed = dict(fields)
    for key, value in fields.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            changed[key] = name
        elif key.endswith("_config") and key != "quantization_config" and isinstance(value, dict):
            changed[key] = _with_dtype(value, dtype)
    return changed


def _write_json(content: Mapping[str, Any], path: Path) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
