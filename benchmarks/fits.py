"""What fits where: the memory of training steps, simulated, and a check of it on small models.

    python -m benchmarks.fits            simulate what the results lack, and write the page
    python -m benchmarks.fits --check    compare with what the allocator gives out

The real step runs with fake tensors and ranks. A batch is 1 x 2,048 tokens; in the check, 8 x 256.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._subclasses import FakeTensorMode
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, MixtralConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import disha
from benchmarks.markdown import NOTHING, table
from benchmarks.memory import allocated_peak
from disha.functional.private_torch import memory_tracker
from disha.sharding.tensors import local_part

# Transformers makes a mask for a fake batch that it would not make for a real one without padding.
AttentionInterface.register("unmasked", sdpa_attention_forward)
RESULTS, PAGE = Path("benchmarks/results/fits.json"), Path("docs/guides/memory.md")
LLAMA = {"num_key_value_heads": 8, "vocab_size": 128256, "dtype": "bfloat16"}
CONFIGS = {
    "Llama-8B": LlamaConfig(intermediate_size=14336, **LLAMA),
    "Llama-70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        **LLAMA),
    "Mixtral-8x7B": MixtralConfig(dtype="bfloat16"),
    "small": LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=1024, dtype="float32"),
}  # fmt: skip
ADAPTERS, R = ("bone", "bat", "lora"), 64
PARTS = ("weights", "adapter", "gradients", "optimizer", "activations")
COLUMNS = [f"{one}{way}" for way in (" recomputed", "") for one in ADAPTERS]
PLACES = [("one process", 1), ("DDP", 8), ("FSDP2", 8), ("FSDP2", 64), ("tensor parallel", 8)]
MARK, END = "<!-- written by python -m benchmarks.fits -->", "<!-- end -->"
CUT = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ColwiseParallel)
CUT |= dict.fromkeys(("o_proj", "down_proj"), RowwiseParallel)


def adapt(model: Any, adapter: str, r: int) -> Any:
    """Adapt all linear layers and stacks of experts but the head."""
    if adapter != "lora":
        return disha.inject_adapters(model, "all-linear", r, method=adapter, exclude=["lm_head"])
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=r // 2, target_modules="all-linear"))


def made(name: str, adapter: str, way: str, recompute: bool, r: int, device: str) -> Any:
    """Return a model with an adapter; for tensor parallelism, the adapter comes later."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="unmasked")
    if recompute:
        model.activation_checkpointing_enable()
    return model.train() if way == "tensor parallel" else adapt(model.train(), adapter, r)


def placed(model: Any, mesh: Any, adapter: str, way: str, r: int) -> Any:
    """Return a model on its ranks."""
    if way == "DDP":  # its first communication compares values
        model = DistributedDataParallel(model, init_sync=False)
        model.register_comm_hook(None, noop_hook)
    layers = [one for one in model.modules() if type(one).__name__.endswith("DecoderLayer")]
    if way == "tensor parallel":
        for layer in layers:
            names = [(name, name.split(".")[-1]) for name, _ in layer.named_modules()]
            plan = {name: CUT[last]() for name, last in names if last in CUT}
            parallelize_module(layer, mesh, plan)
        model = adapt(model, adapter, r)
    if way == "FSDP2":
        for module in (*layers, model):
            fully_shard(module, mesh=mesh)
    return model


def simulated(
    name: str, adapter: str, way: str, ranks: int, recompute: bool, rows: int, tokens: int, r: int
) -> dict[str, int]:
    """Return the bytes of a step on the first of so many ranks, by what they are for."""
    try:
        dist.init_process_group("fake", rank=0, world_size=ranks)
        model = made(name, adapter, way, recompute, r, "meta")
        mesh = init_device_mesh("cpu", (ranks,))
        fake, tracker = FakeTensorMode(allow_non_fake_inputs=True), memory_tracker()
        with fake, tracker:
            model = placed(model.to_empty(device="cpu"), mesh, adapter, way, r)
        weights = [fake.from_tensor(local_part(one)) for one in model.parameters()]
        trained = [one for one in model.parameters() if one.requires_grad]
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        with fake, tracker:
            model(input_ids=ids, labels=ids).loss.backward()
            (peak,) = tracker.get_tracker_snapshot("peak").values()
            optimizer = torch.optim.AdamW(trained)
            optimizer.step()
            (after,) = tracker.get_tracker_snapshot().values()
        held, adapted = (sum(local_part(one).nbytes for one in part) for part in (weights, trained))
        rest = peak["Total"] - held - adapted
        sizes = (held - adapted, adapted, adapted, after["Optstate"], rest)
        return dict(zip(PARTS, sizes, strict=True))
    finally:
        dist.destroy_process_group()


def real(rank: int, adapter: str, way: str, file: str, found: Any) -> None:
    """Measure a step of the small model, as one of two ranks, or alone."""
    if way != "one process":
        dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    mesh = None if way == "one process" else init_device_mesh("cpu", (2,))
    model = placed(made("small", adapter, way, False, 16, "cpu"), mesh, adapter, way, 16)
    ids = torch.zeros(8, 256, dtype=torch.long)
    optimizer = torch.optim.AdamW(one for one in model.parameters() if one.requires_grad)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    peak = allocated_peak(step, torch.device("cpu"))
    if rank == 0:
        found.put(peak)
    if dist.is_initialized():
        dist.destroy_process_group()


def checked(adapter: str, way: str) -> tuple[int, int]:
    """Return what a step takes beyond what is there before it: simulated, and real."""
    ranks = 1 if way == "one process" else 2
    found = simulated("small", adapter, way, ranks, False, 8, 256, 16)
    queue = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(real, (adapter, way, f"{folder}/ranks", queue), nprocs=ranks)
    return found["gradients"] + found["activations"], queue.get()


def page(kept: dict[str, Any]) -> str:
    """Return the table: the peak of each way."""
    rows = []
    for name, (way, ranks) in itertools.product(list(CONFIGS)[:-1], PLACES):
        cells = [kept.get(f"{name}, {way}, {ranks}, {one}") for one in COLUMNS]
        peaks = [f"{sum(one.values()) / 2**30:.1f}" if one else NOTHING for one in cells]
        if any(cells):
            rows.append([name, f"{way.replace(' ', '-')}:{ranks}", *peaks])
    return re.sub(r" ?\| ?", "|", table(["model", "devices", *COLUMNS], rows))


def main() -> None:
    if "--check" in sys.argv:
        for adapter, way in itertools.product(ADAPTERS, ("one process", "FSDP2")):
            print(adapter, way, "simulated {:,}, allocated {:,}".format(*checked(adapter, way)))
        return
    kept: dict[str, Any] = json.loads(RESULTS.read_text())
    for name, (way, ranks), column in itertools.product(list(CONFIGS)[:-1], PLACES, COLUMNS):
        adapter, _, recompute = column.partition(" ")
        key = f"{name}, {way}, {ranks}, {column}"
        uncut = way == "tensor parallel" and (adapter == "lora" or name == "Mixtral-8x7B")
        if key in kept or uncut or (adapter == "bat" and name == "Mixtral-8x7B"):
            continue  # the page says why
        kept[key] = simulated(name, adapter, way, ranks, bool(recompute), 1, 2048, R)
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
        print(key, kept[key], flush=True)
    start, _, rest = PAGE.read_text().partition(MARK)
    PAGE.write_text(start + MARK + "\n\n" + page(kept) + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
