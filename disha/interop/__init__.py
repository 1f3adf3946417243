"""Adapters in the formats of other libraries, and base checkpoints; reached as `disha.interop`.

- `disha.interop.peft`: PEFT folders of MiSS (PEFT's current name for Bone) and of Bone
- `disha.interop.lora`: LoRA in PEFT folders and in GGUF files for llama.cpp
- `disha.interop.image_lora`: LoRA files of image models, for diffusers, kohya's programs, ComfyUI
- `disha.interop.checkpoints`: base checkpoints, merged and verified without a model

None of these libraries is imported: their files are read and written here.

Every conversion passes through an adapter without its model: a header and tensors, as in
`disha.files.contents`. One module per format reads and writes them: `miss` (with `miss_config`),
`lora_folder` (with `low_rank`, which computes the factors, and `experts`), `gguf`, and for image
models `image_writing` and `image_reading` (with `image_names`). `peft`, `lora` and `image_lora`
take an adapter out of a model, or put one into it. `peft_files` reads and writes the two files of a
PEFT folder. `peft_view` tells, for LoRA and MiSS, what PEFT would do with a model.
"""

from disha.interop import checkpoints, image_lora, lora, peft

__all__ = ["checkpoints", "image_lora", "lora", "peft"]
