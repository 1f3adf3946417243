"""Adapter files, format 1: one safetensors file per adapter, with a header that describes it.

- `saving`: saves files, each of them whole
- `opening`: opens files, and says what they are
- `header`: the format of the header
- `contents`: an adapter outside a model; takes it from a model or a file, and puts it into either
- `adapter`: `save_adapter`, `inspect_adapter`, `load_adapter`
- `combining`: `combine_adapters`
"""

from disha.files.adapter import inspect_adapter, load_adapter, save_adapter
from disha.files.combining import combine_adapters
from disha.files.header import FORMAT, AdapterFile, AdapterHeader
from disha.files.opening import ADAPTER_NAME
from disha.records import LayerRecord

__all__ = [
    "ADAPTER_NAME",
    "FORMAT",
    "AdapterFile",
    "AdapterHeader",
    "LayerRecord",
    "combine_adapters",
    "inspect_adapter",
    "load_adapter",
    "save_adapter",
]
