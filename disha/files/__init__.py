"""Adapter files, format 1: one safetensors file per adapter, which describes itself.

A file may come from a stranger: keys, shapes, dtypes, values and header are all checked before the
model changes. From bottom to top:

- `atomic`: `write_files` and `write_folder`, which write files and folders completely or not at all
- `tensors`: reading safetensors files, whatever they hold
- `pieces`: safetensors files as bytes, copied and written one tensor at a time
- `json_files`: JSON objects, in adapter files and in the files of other libraries
- `header`: the format, that is what an adapter file says about itself
- `contents`: an adapter outside a model: out of a model or a file, and into either
- `adapter`: `save_adapter`, `inspect_adapter`, `load_adapter`
- `combining`: `combine_adapters`, and the same for files
- `statistics` and `differences`: the numbers in a file, and what differs between two
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
