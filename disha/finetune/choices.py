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
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from disha import Plan
from disha.text import counted

RATE_OF_UNKNOWN_LAYERS = 1e-4


@dataclass(frozen=True)
class Device:
    """What a run must know of its device."""

    kind: str
    has_bfloat16: bool


@dataclass(frozen=True)
class Choice:
    """The value of a flag, and the reason for it."""

    value: Any
    reason: str


def read_device(kind: str) -> Device:
    """Return what is known of a kind of device; without one here, what holds for recent ones."""
    here = torch.accelerator.current_accelerator(check_available=True)
    if here is None or here.type != kind:
        return Device(kind, has_bfloat16=True)
    if kind == "cuda":  # transformers also counts a GPU that only emulates bfloat16, slowly
        return Device(kind, torch.cuda.is_bf16_supported(including_emulation=False))
    return Device(kind, is_torch_bf16_gpu_available())


def choose(device: Device, plan: Plan | None, given: Mapping[str, Any]) -> dict[str, Choice]:
    """Return the settings of a run by the names of their flags.

    `plan` has the layers that the run adapts, and is None if they are unknown. In `given`, a flag
    that is None or `auto` is not given.
    """
    if device.kind == "cpu":
        bits = Choice("fp32", "processors multiply float32 fastest")
        recomputes = Choice(False, "a processor has more memory than time")
    else:
        bits = Choice("fp16", "the device has no bfloat16; losses are scaled")
        if device.has_bfloat16:
            bits = Choice("bf16", "the device has bfloat16")
        recomputes = Choice(True, "an accelerator has more time than memory")
    choices = {
        "bits": bits,
        "gradient_checkpointing": recomputes,
        "learning_rate": _choose_rate(plan),
    }
    for name, value in given.items():
        if name in choices and value not in (None, "auto"):
            choices[name] = Choice(value, "as given")
    if given.get("fp16") is None:
        is_half = choices["bits"].value == "fp16" and device.kind != "cpu"
        scales_losses = is_half and not given.get("bf16")
        choices["fp16"] = Choice(scales_losses, "small gradients of float16 would round to 0")
    return choices


def _choose_rate(plan: Plan | None) -> Choice:
    if plan is None:
        return Choice(RATE_OF_UNKNOWN_LAYERS, "the layers of the base are unknown")
    layers = plan.layers
    widest = max(layer.in_features for layer in layers)
    reason = (
        f"for {plan.config.method} in {counted(len(layers), 'layer')} of up to {widest:,} inputs"
    )
    return Choice(float(f"{plan.rate:.1e}"), reason)


def describe(device: Device, choices: Mapping[str, Choice]) -> str:
    """Return a line that says what was chosen and why, in the flags that would ask for it."""
    flags = []
    for name in ("bits", "gradient_checkpointing", "learning_rate"):
        choice = choices[name]
        flags.append(f"--{name} {str(choice.value).lower()} ({choice.reason})")
    return f"on {device.kind}: {', '.join(flags)}"
