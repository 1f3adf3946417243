"""Adapter files, format 1: one self-describing safetensors file per adapter.

Nothing in a file is trusted: keys, shapes, dtypes, values and header are all checked before the
model changes. From bottom to top:

- `atomic`: `write_files` and `write_folder`, which write a file or a folder complete or not at all
- `tensors`: safetensors files, whatever they hold
- `pieces`: the same as bytes, copied and written one tensor at a time
- `json_files`: configurations and indexes beside them, as others write them
- `header`: what an adapter file says of itself
- `contents`: an adapter away from its model: out of a model, out of a file, into either
- `adapter`: `save_adapter`, `inspect_adapter`, `load_adapter`
"""

from disha.files.adapter import inspect_adapter, load_adapter, save_adapter
from disha.files.atomic import write_files, write_folder
from disha.files.combining import combine_adapters
from disha.files.contents import AdapterFileWarning
from disha.files.header import FORMAT, AdapterFile, AdapterHeader, LayerRecord, TensorRecord

__all__ = [
    "FORMAT",
    "AdapterFile",
    "AdapterFileWarning",
    "AdapterHeader",
    "LayerRecord",
    "TensorRecord",
    "combine_adapters",
    "inspect_adapter",
    "load_adapter",
    "save_adapter",
    "write_files",
    "write_folder",
]
