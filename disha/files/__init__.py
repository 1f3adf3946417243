"""Adapter files, format 1: one safetensors file per adapter, with a header that describes it.

A file may come from a stranger, so keys, shapes, dtypes, values and header are all checked before
the model changes. From bottom to top:

- `atomic`: `write_files`, `write_folder` and `remove_folder`, which act completely or not at all
- `reading`: opens regular files, and reads small ones whole
- `json_files`: reads JSON objects, in adapter files and in the files of other libraries
- `tensors`: reads safetensors files of any content, one tensor at a time
- `pieces`: writes safetensors files, one tensor at a time
- `checksum`: shows whether a bit of a file has flipped
- `header`: the format of the header
- `contents`: an adapter outside a model; takes it from a model or a file, and puts it into either
- `adapter`: `save_adapter`, `inspect_adapter`, `load_adapter`
- `combining`: `combine_adapters`, and the same for files
- `statistics` and `differences`: statistics of the tensors in a file, and differences of two files
"""

from disha.files.adapter import inspect_adapter, load_adapter, save_adapter
from disha.files.atomic import clear_drafts, remove_folder, write_files, write_folder
from disha.files.combining import combine_adapters
from disha.files.header import FORMAT, AdapterFile, AdapterHeader
from disha.files.json_files import read_json
from disha.files.opening import ADAPTER_NAME
from disha.files.reading import explained, found_at, opened_file, read_text
from disha.records import LayerRecord, TensorRecord

__all__ = [
    "ADAPTER_NAME",
    "FORMAT",
    "AdapterFile",
    "AdapterHeader",
    "LayerRecord",
    "TensorRecord",
    "clear_drafts",
    "combine_adapters",
    "explained",
    "found_at",
    "inspect_adapter",
    "load_adapter",
    "opened_file",
    "read_json",
    "read_text",
    "remove_folder",
    "save_adapter",
    "write_files",
    "write_folder",
]
