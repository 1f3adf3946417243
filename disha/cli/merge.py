"""``disha merge``: a base checkpoint with an adapter in its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from disha.cli.flags import Flags, parsed
from disha.cli.noted import base_of
from disha.cli.output import advancing, require_free, show
from disha.config import BLOCK_DTYPES
from disha.errors import ArgumentError
from disha.finetune.merging import merge_into_base
from disha.finetune.models.hub_cache import located

__all__ = ["run"]

DESCRIPTION = """Write a copy of a base checkpoint with an adapter merged into its weights.

W becomes W + s * dW, computed in float32 and rounded once. Only one tensor is in memory at a time.
The result loads wherever the base loads.

examples:
  disha merge path/to/model adapter.safetensors path/to/merged-model
  disha merge out/adapter.safetensors path/to/merged-model
  disha merge model.safetensors adapter.safetensors merged.safetensors
  disha merge path/to/model adapter.safetensors path/to/half --scale 0.5 --dtype bfloat16"""


@dataclass(frozen=True)
class MergeFlags(Flags):
    """The arguments of `disha merge`.

    Args:
        paths: Three paths: BASE, ADAPTER and OUT. BASE is a checkpoint: a safetensors file, a
            folder as Hugging Face libraries write it, or the name of a model in their local cache.
            It can be left out if the adapter file notes its base, as disha finetune does. ADAPTER
            is the adapter file. OUT is the folder to write, or one file if it ends with
            .safetensors.
        no_also_train: Ignore the parameters that were saved with the blocks, and keep those of the
            base.
        scale: The scale s of all layers, instead of the adapter's own.
        dtype: Number format of all floating-point tensors. With own, each keeps its format.
        force: Merge even if the adapter was saved from other base weights, or if embeddings or
            output heads may be tied.
        overwrite: Replace an existing checkpoint, with everything in its folder.
    """

    paths: tuple[Path, ...]
    no_also_train: bool = False
    scale: float | None = None
    dtype: Literal["own", "float16", "bfloat16", "float32", "float64"] = "own"
    force: bool = False
    overwrite: bool = False


def run(arguments: Sequence[str]) -> None:
    """Merge an adapter into a checkpoint, with the given command-line arguments."""
    flags = parsed(MergeFlags, "merge", arguments, DESCRIPTION)
    base, adapter, out = _paths(flags.paths)
    require_free(out, flags.overwrite)
    with advancing("merging") as progress:
        merged = merge_into_base(
            located(base),
            adapter,
            out,
            also_train=not flags.no_also_train,
            scale=flags.scale,
            dtype=BLOCK_DTYPES.get(flags.dtype),
            force=flags.force,
            overwrite=flags.overwrite,
            progress=progress,
        )
    show(
        flags.json,
        str(merged),
        {
            "path": str(merged.path),
            "layers": list(merged.layers),
            "replaced": list(merged.replaced),
            "files": list(merged.files),
            "left_out": list(merged.left_out),
            "bytes": merged.nbytes,
        },
    )


def _paths(paths: tuple[Path, ...]) -> tuple[Path, Path, Path]:
    """Return the base, the adapter, and where to write."""
    if not 2 <= len(paths) <= 3:
        raise ArgumentError(
            f"disha merge takes [BASE] ADAPTER OUT, got {len(paths)} paths; see disha merge --help"
        )
    if len(paths) == 3:
        return paths
    adapter, out = paths
    noted = base_of(adapter)
    if noted is None:
        raise ArgumentError(
            f"{adapter} does not note its base; give it first: disha merge BASE {adapter} {out}"
        )
    return noted.base_model, adapter, out
