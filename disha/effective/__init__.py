"""The mechanism: reading an adapted parameter gives an effective weight.

- `weight`: the tensor that stands for W + sum of s dW, and what an operation does by default
- `rules`: the tables of rules; `facts`, `views`, `products`, `attention`, `writes`: the rules
- `tensor_parallel`: the effective weight of a rank's part
- `contexts`: which adapters act for the current thread or task
- `torch_patches`: what the first injection changes in torch (its names: `private_torch`)
"""

from disha.effective import attention, facts, products, views, writes
from disha.effective.weight import EffectiveWeight

__all__ = [
    "EffectiveWeight",
    "attention",
    "facts",
    "products",
    "views",
    "writes",
]
