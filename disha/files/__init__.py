"""Adapter files, format 1: one safetensors file per adapter, with a header that describes it.

- `disk`: saves files, each of them whole, and opens them
- `header`: the format of the header
- `contents`: reads an adapter from a file, or writes it, without its model
- `saving` and `loading`: take an adapter out of a model, and put it into one
- `hub`: finds an adapter by its name on the Hugging Face Hub
- `combining`: `combine_adapters`
"""

from disha.files.combining import combine_adapters
from disha.files.disk import ADAPTER_NAME, file_at, save
from disha.files.header import FORMAT, AdapterContents, AdapterFile
from disha.files.hub import find_adapter
from disha.files.saving import save_adapter
from disha.layers.spec import BlockSpec

__all__ = [
    "ADAPTER_NAME",
    "FORMAT",
    "AdapterContents",
    "AdapterFile",
    "BlockSpec",
    "combine_adapters",
    "file_at",
    "find_adapter",
    "save",
    "save_adapter",
]
