"""Adapters in the formats of other libraries, and base checkpoints; reached as `disha.interop`.

- `disha.interop.peft`: PEFT folders of MiSS (PEFT's current name for Bone) and of Bone
- `disha.interop.lora`: LoRA in PEFT folders
- `disha.interop.image_lora`: LoRA files of image models, with the keys of `diffusers`
- `disha.interop.checkpoints`: base checkpoints, merged without a model

Every conversion passes through an adapter without its model: a header and tensors. `peft_format`
knows PEFT's files and what PEFT does with a model, `low_rank` computes LoRA factors, and `experts`
lays out those of stacked experts.
"""

from disha.interop import checkpoints, image_lora, lora, peft

__all__ = ["checkpoints", "image_lora", "lora", "peft"]
