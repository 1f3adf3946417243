"""Adapters as PEFT keeps them: a folder with `adapter_config.json` and `adapter_model.safetensors`.

PEFT calls Bone *MiSS*, a tile its "mini", BAT its "bat"; the blocks are the same numbers, in the
same shapes, under `base_model.model.<layer>.miss_block` (`bone_block` up to PEFT 0.18). Neither way
imports PEFT. `export` and `load` work on a model, which tells whether PEFT would do the same there.
`write_folder` and `read_folder` with `contents_of` work without one:

- a folder does not say how large a layer's input is, so `contents_of` asks for the shapes of the
  base's weights;
- parameters trained beside the adapter are written from a model only: PEFT saves whole modules, and
  a file of ours does not say what else a module has.

What PEFT has no place for is refused before anything is written: other layers than `nn.Linear`, a
scale, a different r in each layer, BAT in sizes that r does not divide or with dropout. Notes and
the fingerprint of the base are not carried over.

From bottom to top:

- `config`: `adapter_config.json`
- `folder`: both files together, without a model
- `view`: a model as PEFT sees it
- `adapter`: `export` and `load`
"""

from disha.interop.peft.adapter import export, load
from disha.interop.peft.folder import (
    BaseShapes,
    PeftFolder,
    contents_of,
    read_folder,
    write_folder,
)

__all__ = [
    "BaseShapes",
    "PeftFolder",
    "contents_of",
    "export",
    "load",
    "read_folder",
    "write_folder",
]
