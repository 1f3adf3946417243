"""What fits where: the memory of training steps, simulated, and a check of it on small models.

    python -m benchmarks.fits    simulate what the results lack

The real step runs with fake tensors and ranks. A batch is 1 x 2,048 tokens; in the check, 8 x 256.
"""

from __future__ import annotations

import gc
import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AttentionInterface, LlamaConfig, MixtralConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import disha
from benchmarks.markdown import NOTHING, table
from benchmarks.memory import allocated_peak
from benchmarks.simulation import make_base
from benchmarks.steps import full_step
from disha.finetune.memory import step_memory
from disha.private_torch import memory_modes

# Transformers makes a mask for a fake batch that it would not make for a real one without padding.
ATTENTION = "unmasked"
AttentionInterface.register(ATTENTION, sdpa_attention_forward)
RESULTS = Path("benchmarks/results/fits.json")
LLAMA = {"num_key_value_heads": 8, "vocab_size": 128256, "dtype": "bfloat16"}
CONFIGS = {
    "Llama-1B": LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        tie_word_embeddings=True, **LLAMA),
    "Llama-8B": LlamaConfig(intermediate_size=14336, **LLAMA),
    "Llama-70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        **LLAMA),
    "Mixtral-8x7B": MixtralConfig(dtype="bfloat16"),
    "small": LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=1024, dtype="float32"),
}  # fmt: skip
R = 64
RECIPES = (
    ("Llama-1B", 16, "one process", 1, False),
    ("Llama-1B", 16, "one process", 1, True),
    ("Llama-1B", 16, "DDP", 8, False),
    ("Llama-8B", 4, "one process", 1, True),
    ("Llama-8B", 4, "one process", 1, False),
    ("Llama-8B", 16, "one process", 1, True),
    ("Llama-8B", 16, "one process", 1, False),
    ("Llama-8B", 4, "DDP", 2, True),
    ("Llama-8B", 16, "DDP", 2, True),
    ("Llama-8B", 16, "DDP", 8, True),
    ("Llama-8B", 16, "DDP", 8, False),
    ("Llama-8B", 16, "FSDP2", 8, False),
    ("Llama-70B", 4, "one process", 1, True),
    ("Llama-70B", 4, "FSDP2", 8, True),
    ("Llama-70B", 16, "FSDP2", 8, True),
    ("Mixtral-8x7B", 16, "FSDP2", 8, True),
    ("Mixtral-8x7B", 4, "FSDP2", 8, True),
)
"""Base, bits, way, GPUs, and whether activations are computed again: the default on a GPU."""
UNKNOWN = ("Mixtral-8x7B", 4, "lora")
"""What can't be simulated: PEFT's LoRA on stacks of experts in 4 bits."""
GPUS, SHARE = (24, 48, 80), 0.9
"""Memory of GPUs in GiB, which are sold by as many GB, and the share of it that a step may take."""


def adapt(model: Any, adapter: str, r: int) -> Any:
    """Adapt all linear layers and stacks of experts but the head."""
    if adapter != "lora":
        return disha.inject_adapters(model, "all-linear", r, method=adapter, exclude=["lm_head"])
    config = LoraConfig(r=r // 2, target_modules="all-linear")
    with unset_fake_temporarily():  # PEFT would move its parameters, which fake ones can't be
        model = get_peft_model(model, config, low_cpu_mem_usage=True)
    for module in model.modules():
        if any(one.is_meta for one in module.parameters(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
    return model


@contextmanager
def pretend_group(ranks: int) -> Iterator[None]:
    """Let this process be the first of several, which communicate nothing."""
    if ranks == 1:
        yield
        return
    dist.init_process_group("fake", rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def make_step(
    ranks: int,
    name: str,
    adapter: str,
    way: str,
    bits: int,
    recompute: bool,
    r: int,
) -> tuple[Any, torch.optim.Optimizer]:
    """Return a model with an adapter, on its ranks, and an optimizer."""
    model = make_base(CONFIGS[name], bits, ATTENTION).train()
    if recompute:
        model.activation_checkpointing_enable()
    layers = [one for one in model.modules() if type(one).__name__.endswith("DecoderLayer")]
    model = adapt(model, adapter, r)
    if way == "DDP":  # its first communication compares values
        model = DistributedDataParallel(model, init_sync=False)
        model.register_comm_hook(None, noop_hook)
    if way == "FSDP2":
        with unset_fake_temporarily():  # a mesh reads the numbers of its ranks
            mesh = init_device_mesh("cpu", (ranks,))
        for module in (*layers, model):
            fully_shard(module, mesh=mesh)
    return model, torch.optim.AdamW(one for one in model.parameters() if one.requires_grad)


def simulated(ranks: int, rows: int, tokens: int, *of_model: Any) -> dict[str, int]:
    """Return the bytes of a step on the first of so many ranks, by what they are for."""
    modes = fake, tracker = memory_modes()
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    with pretend_group(ranks):
        with fake, tracker:
            model, optimizer = make_step(ranks, *of_model)
            gc.collect()  # what was quantised is in cycles
        return step_memory(model, optimizer, lambda: model(input_ids=ids, labels=ids).loss, modes)


def real(rank: int, ranks: int, file: str, found: Any, *of_model: Any) -> None:
    """Measure a step of a small model on a rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    model, optimizer = make_step(ranks, *of_model)
    ids = torch.zeros(8, 256, dtype=torch.long)
    step = full_step(lambda: model(input_ids=ids, labels=ids).loss, optimizer)
    step()
    peak = allocated_peak(step, torch.device("cpu"))
    if rank == 0:
        found.put(peak)
    dist.destroy_process_group()


def checked(adapter: str, way: str, bits: int = 16) -> tuple[int, int]:
    """Return what a step takes beyond what is there before it: simulated, and real."""
    ranks, of_model = 1 if way == "one process" else 2, ("small", adapter, way, bits, False, 16)
    found = simulated(ranks, 8, 256, *of_model)
    queue = mp.get_context("fork").SimpleQueue()  # the ranks import nothing again
    with tempfile.TemporaryDirectory() as folder:
        given = (ranks, f"{folder}/ranks", queue, *of_model)
        mp.start_processes(real, given, nprocs=ranks, start_method="fork")
    return found["gradients"] + found["activations"], queue.get()


def key(name: str, bits: int, way: str, ranks: int, recompute: bool, adapter: str) -> str:
    """Return the name of a case in the results."""
    again = " recomputed" if recompute else ""
    return f"{name}, {bits} bits, {way}, {ranks}, {adapter}{again}"


def recipes(kept: Mapping[str, Any]) -> str:
    """Return the table of the guide: flags, memory, and the GPUs that it fits."""
    rows = []
    for recipe in RECIPES:
        name, bits, way, ranks, recompute = recipe
        found, other = kept[key(*recipe, "bone")], kept.get(key(*recipe, "lora"))
        flags = f"--bits {'bf16' if bits == 16 else bits} --gradient_checkpointing"
        flags += "" if recompute else " false"
        flags += " --fsdp full_shard" if way == "FSDP2" else ""
        peak = found["peak"] / 2**30
        rows.append(
            [
                name,
                "1" if ranks == 1 else f"{ranks}, {way}",
                f"`{flags}`",
                f"{peak:.1f}",
                f"{other['peak'] / 2**30:.1f}" if other else NOTHING,
                f"{found['activations'] / 2**30:.1f}",
                ", ".join(str(size) for size in GPUS if peak <= SHARE * size) or "none",
            ]
        )
    header = [
        *("base", "GPUs", "flags", "GiB for one example", "with PEFT's LoRA"),
        *("each further example, at most", "fits GPUs of (GB)"),
    ]
    return table(header, rows)


def main() -> None:
    """Simulate what the results lack."""
    kept: dict[str, Any] = json.loads(RESULTS.read_text())
    for recipe, adapter in itertools.product(RECIPES, ("bone", "lora")):
        name, bits, way, ranks, recompute = recipe
        case = key(*recipe, adapter)
        if case not in kept and (name, bits, adapter) != UNKNOWN:
            kept[case] = simulated(ranks, 1, 2048, name, adapter, way, bits, recompute, R)
            RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
            print(case, kept[case], flush=True)


if __name__ == "__main__":
    main()
