"""Adapters in the formats of other libraries, and base checkpoints; reached as `disha.interop`.

- `disha.interop.peft`: PEFT's folders of MiSS (PEFT's name for Bone today) and of Bone
- `disha.interop.lora`: LoRA in PEFT's folders and in llama.cpp's GGUF files
- `disha.interop.checkpoints`: base checkpoints, merged and verified without a model

None of these libraries is imported: their files are read and written here.

Every conversion goes by way of an adapter that is away from its model, as `disha.files.contents`
has it: a header and tensors. One module per format reads and writes it: `miss` (with
`miss_config`), `lora_folder` (with `low_rank`, which computes the factors), and `gguf`. `peft` and
`lora` take an adapter out of a model, or put one into it. `peft_files` has the two files of a PEFT
folder, and `peft_view` answers for both formats what PEFT would do with a model.
"""

from disha.interop import checkpoints, lora, peft

__all__ = ["checkpoints", "lora", "peft"]
