"""``disha merge``: a base checkpoint with an adapter in its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from disha.cli.flags import FileArgument, Flags, parsed
from disha.cli.output import advancing, show
from disha.config import BLOCK_DTYPES
from disha.interop.checkpoints import merge_into_checkpoint

__all__ = ["run"]

DESCRIPTION = """Write a copy of a base checkpoint with an adapter merged into its weights.

W becomes W + s * dW, computed in float32 and rounded once. Tensor after tensor is read and
written, so that memory holds one of them. The result is read by whatever reads the base.

examples:
  disha merge path/to/model adapter.safetensors path/to/merged-model
  disha merge model.safetensors adapter.safetensors merged.safetensors
  disha merge path/to/model adapter.safetensors path/to/half --scale 0.5 --dtype bfloat16"""


@dataclass(frozen=True)
class MergeFlags(Flags):
    """The arguments of `disha merge`."""

    base: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="BASE")]
    """The checkpoint: a safetensors file, or a folder as Hugging Face libraries write it."""

    adapter: FileArgument
    """The adapter file."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The folder to write; or one file, if it ends with .safetensors."""

    also_train: bool = True
    """Leave what is saved beside the blocks as the base has it."""

    scale: Annotated[float | None, tyro.conf.arg(metavar="S")] = None
    """Runtime scale s of all layers, in place of the adapter's own."""

    dtype: Literal["own", "float16", "bfloat16", "float32", "float64"] = "own"
    """What to store all floating-point tensors in; own: each in what it is in."""

    force: bool = False
    """Merge though the weights are others than the adapter's, or embeddings may be tied."""

    overwrite: bool = False
    """Replace the checkpoint that is there, its folder with all that is in it."""


def run(arguments: Sequence[str]) -> None:
    """Merge an adapter into a checkpoint, as command-line `arguments` say."""
    flags = parsed(MergeFlags, "merge", arguments, DESCRIPTION)
    with advancing("merging") as progress:
        merged = merge_into_checkpoint(
            flags.base,
            flags.adapter,
            flags.out,
            also_train=flags.also_train,
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
