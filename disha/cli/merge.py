"""``disha merge``: a base model with an adapter in its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from disha.cli.dispatcher import Parser
from disha.cli.output import require_free
from disha.config import BLOCK_DTYPES
from disha.errors import ArgumentError
from disha.interop.checkpoints import merge_into_checkpoint

__all__ = ["main"]

USAGE = """Write a copy of a base with an adapter merged: W becomes W + s * dW, rounded once.
A base on disk is copied tensor by tensor; one that is only a name is loaded with transformers.

examples:
  disha merge path/to/model adapter.safetensors path/to/merged-model
  disha merge output/adapter.safetensors path/to/merged-model
  disha merge model.safetensors adapter.safetensors merged.safetensors"""

PATHS = """[BASE] ADAPTER OUT. BASE is a safetensors file, a folder or a name; by default the one
that the adapter file notes. OUT is a folder, or a file if it ends with .safetensors"""


def main(words: Sequence[str]) -> None:
    """Merge an adapter into a base."""
    parser = Parser("merge", USAGE)
    parser.add_argument("paths", nargs="+", metavar="PATH", help=PATHS)
    parser.add_argument("--scale", type=float, help="s of all layers, instead of the adapter's own")
    parser.add_argument("--dtype", choices=BLOCK_DTYPES, help="of all weights; as they are")
    parser.add_argument("--no_also_train", action="store_true", help="merge the blocks alone")
    parser.add_argument("--force", action="store_true", help="also into another or a tied base")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    flags = parser.parsed(words)
    if not 2 <= len(flags.paths) <= 3:
        raise ArgumentError("disha merge takes [BASE] ADAPTER OUT; see disha merge --help")
    adapter, out = map(Path, flags.paths[-2:])
    require_free(out, flags.overwrite)
    base = flags.paths[0] if len(flags.paths) == 3 else _noted(adapter)
    if not Path(base).exists():
        _merge_with_transformers(base, adapter, out)
        return
    merged = merge_into_checkpoint(
        base,
        adapter,
        out,
        also_train=not flags.no_also_train,
        scale=flags.scale,
        dtype=BLOCK_DTYPES.get(flags.dtype),
        force=flags.force,
        overwrite=flags.overwrite,
    )
    print(merged)


def _merge_with_transformers(base: str, adapter: Path, out: Path) -> None:
    from disha.finetune.merging import merge_base

    merge_base(base, adapter, out)
    print(f"{out}: {adapter} merged into {base}")


def _noted(adapter: Path) -> str:
    from disha.cli.models import noted  # transformers takes seconds to import

    return noted(adapter)[0]
