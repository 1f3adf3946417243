"""``disha combine``: the weighted sum of adapter files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import disha
from disha.cli.flags import Flags, parsed
from disha.cli.output import require_free, show, with_progress
from disha.files.combining import Summand, combine_contents
from disha.files.contents import read_contents, write_contents

__all__ = ["run"]

DESCRIPTION = """Write the weighted sum of adapters: dW = sum of w * s * dW of each, exactly.

All adapters must have the same method and belong to the same model. If an adapter lacks a layer,
its dW is zero there. Bone blocks of different r get the least common multiple. No model is needed.

examples:
  disha combine --adapter chat.safetensors=0.3 --adapter code.safetensors=0.7 both.safetensors
  disha combine --adapter a.safetensors=1 --adapter b.safetensors=-1 difference.safetensors
  disha combine --adapter a.safetensors=0.5 weaker.safetensors --json"""


@dataclass(frozen=True)
class CombineFlags(Flags):
    """The arguments of `disha combine`.

    Args:
        out: The adapter file to write.
        adapter: An adapter file and its weight, such as a.safetensors=0.3. Repeat it for each
            adapter.
        no_also_train: Leave out the parameters that were saved with the blocks. Without this flag,
            an adapter with such parameters is refused.
        overwrite: Replace an existing file.
    """

    out: Path
    adapter: tuple[str, ...] = ()
    no_also_train: bool = False
    overwrite: bool = False


def run(arguments: Sequence[str]) -> None:
    """Write the sum of adapters, with the given command-line arguments."""
    flags = parsed(CombineFlags, "combine", arguments, DESCRIPTION)
    if not flags.adapter:
        raise disha.ArgumentError("no --adapter FILE=WEIGHT was given; give one for each adapter")
    weights = [_weighted(word) for word in flags.adapter]
    require_free(flags.out, flags.overwrite)
    summands = [
        Summand(path, read_contents(path, also_train=not flags.no_also_train), weight)
        for path, weight in with_progress(weights, len(weights), "reading")
    ]
    for summand in summands:
        if summand.header.also_train:
            raise disha.ArgumentError(
                f"{summand.source} holds parameters besides its blocks, such as "
                f"{summand.header.also_train[0]}, which can't be added up like updates; give "
                "--no-also-train to leave them out"
            )
    write_contents(flags.out, *combine_contents(summands))
    written = disha.inspect_adapter(flags.out)
    show(
        flags.json,
        str(written),
        {
            "path": str(flags.out),
            "adapters": [{"path": str(path), "weight": weight} for path, weight in weights],
            "layers": len(written.layers),
            "parameters": written.parameters,
            "bytes": written.nbytes,
        },
    )


def _weighted(word: str) -> tuple[Path, float]:
    """Return the path and the number in `FILE=WEIGHT`."""
    path, _, weight = word.rpartition("=")
    try:
        number = float(weight)
    except ValueError:
        path = ""
    if not path:
        raise disha.ArgumentError(
            f"--adapter {word}: must be FILE=WEIGHT, such as a.safetensors=0.3"
        )
    return Path(path), number
