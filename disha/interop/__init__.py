"""Adapters in the formats of others, and base checkpoints on disk; reached as `disha.interop`.

- `disha.interop.peft`: PEFT's folders of MiSS (Bone's later name) and of Bone, both ways
- `disha.interop.lora`: LoRA, in PEFT's folders and in llama.cpp's GGUF files
- `disha.interop.checkpoints`: base checkpoints, merged and verified without a model

None of these libraries is imported: their files are read and written here.
"""

from disha.interop import checkpoints, lora, peft

__all__ = ["checkpoints", "lora", "peft"]
