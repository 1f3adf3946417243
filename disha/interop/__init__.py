"""Adapters in the formats of others, and base checkpoints on disk; reached as `disha.interop`.

- `disha.interop.lora`: LoRA, in PEFT's folders and in llama.cpp's GGUF files

None of these libraries is imported: their files are read and written here.
"""

from disha.interop import lora

__all__ = ["lora"]
