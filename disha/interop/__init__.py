"""Adapters in the formats of other libraries, and base checkpoints; reached as `disha.interop`.

- `disha.interop.peft`: write PEFT folders of MiSS, which is PEFT's present name for Bone
- `disha.interop.lora`: write LoRA in PEFT folders
- `disha.interop.image_lora`: LoRA files of image models, with the keys of `diffusers`
- `disha.interop.checkpoints`: base checkpoints, merged without a model

`adapters` loads and inspects adapters of every format, and `peft_reading` reads PEFT's folders.
Every conversion passes through an adapter without its model: a header and tensors. `peft_format`
knows PEFT's files and what PEFT does with a model, `low_rank` computes LoRA factors, and `experts`
lays out those of stacked experts.
"""

from disha.interop import checkpoints, image_lora, lora, peft
from disha.interop.adapters import inspect_adapter, load_adapter

__all__ = ["checkpoints", "image_lora", "inspect_adapter", "load_adapter", "lora", "peft"]
