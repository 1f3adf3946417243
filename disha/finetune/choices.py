"""The settings that a run chooses by its device and by the layers that it adapts.

| flag | on a processor | on an accelerator |
|---|---|---|
| `--bits` | `fp32` | `bf16`, or `fp16` with scaled losses where the device has no bfloat16 |
| `--gradient_checkpointing` | false | true |
| `--learning_rate` | by the layers that are adapted | the same |

A flag that is given has precedence. All else is as `transformers` has it on the device: the fused
AdamW, pinned memory and tf32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from disha import Plan
from disha.text import counted

NAMES = ("bits", "gradient_checkpointing", "learning_rate")
"""The flags that are chosen, in the order in which they are told."""


class Choice(NamedTuple):
    """The value of a flag, and the reason for it."""

    value: Any
    reason: str


def has_bfloat16(kind: str) -> bool:
    """Return whether the device of this kind computes in bfloat16."""
    if kind == "cuda":  # transformers also counts a GPU that only emulates bfloat16, slowly
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(is_torch_bf16_gpu_available())


def choose(kind: str, computes_bfloat16: bool, given: Mapping[str, Any]) -> dict[str, Choice]:
    """Return the settings of a run on a kind of device, by the names of their flags.

    In `given`, a flag that is None or `auto` is not given.
    """
    if kind == "cpu":
        bits = Choice("fp32", "processors multiply float32 fastest")
        recomputes = Choice(False, "a processor has more memory than time")
    else:
        bits = Choice("fp16", "the device has no bfloat16; losses are scaled")
        if computes_bfloat16:
            bits = Choice("bf16", "the device has bfloat16")
        recomputes = Choice(True, "an accelerator has more time than memory")
    choices = {"bits": bits, "gradient_checkpointing": recomputes}
    for name in NAMES:
        if given.get(name) not in (None, "auto"):
            choices[name] = Choice(given[name], "as given")
    if given.get("fp16") is None:
        is_half = choices["bits"].value == "fp16" and kind != "cpu"
        scales_losses = is_half and not given.get("bf16")
        choices["fp16"] = Choice(scales_losses, "small gradients of float16 would round to 0")
    return choices


def choose_rate(plan: Plan) -> dict[str, Choice]:
    """Return the learning rate of a run that adapts these layers."""
    widest = max(layer.in_features for layer in plan.layers)
    count = counted(len(plan.layers), "layer")
    reason = f"for {plan.config.method} in {count} of up to {widest:,} inputs"
    return {"learning_rate": Choice(float(f"{plan.rate:.1e}"), reason)}


def describe(choices: Mapping[str, Choice]) -> str:
    """Return a line that says what was chosen and why, in the flags that would ask for it."""
    flags = []
    for name in NAMES:
        if name in choices:
            value, reason = choices[name]
            flags.append(f"--{name} {str(value).lower()} ({reason})")
    return ", ".join(flags)
