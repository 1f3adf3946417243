"""The host memory that each of two ranks takes, while a base is loaded and an engine shards it.

    python -m tests.distributed.loading output

It is the most that a rank holds at one time, beyond what it held before. Pages of the base's file
count on each rank that reads it, although the ranks of a machine share them. Each way has ranks of
its own, because memory that an earlier one has left would be freed in the middle.
"""

import gc
import json
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import torch.distributed as dist

from benchmarks.markdown import bytes_text
from disha.finetune import train
from disha.finetune.arguments import parse_flags
from tests.distributed import trainers
from tests.distributed.__main__ import on_ranks
from tests.distributed.deepspeed_zero import config
from tests.finetune.tiny_models import write_model, write_rows
from tests.processes import RANKS

SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6,
         "num_attention_heads": 12, "num_key_value_heads": 4}  # fmt: skip
FSDP = ["--fsdp", "full_shard"]
EVERY_RANK = ["--fsdp_config", '{"cpu_ram_efficient_loading": false}']
WAYS = {
    "DDP": ("ddp", []),
    "FSDP2, every rank reads": ("fsdp2", [*FSDP, *EVERY_RANK]),
    "FSDP2": ("fsdp2", FSDP),
    "ZeRO-3": ("zero3", ["--deepspeed", "zero3.json"]),
}
"""How a base is loaded -> the engine, and its flags."""


def held(name):
    """Return bytes of this process's physical memory: `VmRSS` is that of now, `VmHWM` its peak."""
    [kilobytes] = re.findall(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


def taken(folder, base, engine, flags):
    """Return the bytes that this rank takes at most to load and shard a base."""
    words = ["--base", base, "--data", "rows.jsonl", "--output_dir", "out", *flags]
    words = [str(folder / word) if (folder / word).exists() else word for word in words]
    with trainers.accelerate_with(engine):
        flags = parse_flags([*words, "--r", "8", "--per_device_train_batch_size", "2"])
        before = held("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # lets the peak begin anew
        trainer, _ = train.make_trainer(flags, {})
        if engine == "fsdp2":
            trainer.accelerator.prepare(trainer.model, trainer.create_optimizer())
        return held("VmHWM") - before


def measure(way, folder):
    """Return what each rank takes, as a share of the base. The first load also imports."""
    datasets.config.HF_DATASETS_CACHE = folder / f"cache{dist.get_rank()}"
    shares = [0.0] * RANKS
    for name, sizes in (("tiny", {}), ("model", SIZES)):
        if dist.get_rank() == 0:
            write_model(folder / name, **sizes)
            write_rows(folder / "rows.jsonl")
            (folder / "zero3.json").write_text(json.dumps(config(3)))
        gc.collect()  # what was written, and the tiny base, would be freed in the middle
        dist.barrier()
        size = (folder / name / "model.safetensors").stat().st_size
        dist.all_gather_object(shares, taken(folder, name, *WAYS[way]) / size)
    if dist.get_rank() == 0:
        told = " and ".join(f"{share:.2f}" for share in shares)
        print(f"{way}: the ranks take {told} of {bytes_text(size)}", flush=True)
    return shares


def check_fsdp2(folder):
    """A rank that reads no weights takes half of them, and what is on its way to it."""
    if Path("/proc/self/clear_refs").exists():  # only Linux tells the peak
        assert measure("FSDP2", folder)[1] < 0.8


if __name__ == "__main__":
    for number, name in enumerate(WAYS):
        script = SimpleNamespace(check_way=partial(measure, name))
        on_ranks(script, Path(sys.argv[1], str(number)))
