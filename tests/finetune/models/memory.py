"""Loads models one after another, and prints the most memory that each took beside itself.

Run as a program, so that nothing else is measured: the arguments are JSON, a list of
{"path", "dtype", "bits"}.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from disha.finetune.models.checkpoint import open_model


def memory(field: str) -> int:
    """A field of this process's memory, in bytes: VmRSS is what it takes, VmHWM the most yet."""
    status = Path("/proc/self/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


def measure(path: str, dtype: str, bits: int | None) -> dict[str, int]:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or the model before would have left room for this one
    Path("/proc/self/clear_refs").write_text("5")  # from here on, VmHWM counts anew
    before = memory("VmRSS")
    model = open_model(Path(path)).load_model(getattr(torch, dtype), bits=bits)
    peak = memory("VmHWM") - before
    return {"peak": peak, "size": sum(one.nbytes for one in model.parameters())}


def main() -> None:
    torch.set_num_threads(1)
    # What the library takes for itself is not the model's.
    Linear4bit(64, 64).to("cpu")
    Linear8bitLt(64, 64, has_fp16_weights=False).to("cpu")
    print(json.dumps([measure(**case) for case in json.loads(sys.argv[1])]))


if __name__ == "__main__":
    main()
