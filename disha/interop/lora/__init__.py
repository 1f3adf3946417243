"""LoRA: export a model's adapter as a folder in PEFT's layout, and load such a folder.

Most LoRA runtimes read this layout. Bone and tile become LoRA without loss: B holds the block's
own values, and lora_alpha the runtime scale. BAT is truncated to a rank. `export_tensors` gives the
same without a file.
"""

from disha.interop.lora.reading import load
from disha.interop.lora.writing import export, export_tensors
from disha.interop.low_rank import LoraReport

__all__ = ["LoraReport", "export", "export_tensors", "load"]
