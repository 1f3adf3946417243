"""What fits where: the memory of training steps, simulated, and a check of it on small models.

    python -m benchmarks.fits    simulate what the results lack

The real step runs with fake tensors and ranks. A batch is 1 x 2,048 tokens; in the check, 8 x 256.
"""

from __future__ import annotations

import gc
import itertools
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
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
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, MixtralConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import disha
from benchmarks import four_bits
from benchmarks.markdown import NOTHING, table
from benchmarks.memory import allocated_peak
from benchmarks.simulation import make_without_values, memory_modes, step_memory
from benchmarks.steps import full_step

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
ADAPTERS, R = ("bone", "bat", "lora"), 64
COLUMNS = [f"{one}{way}" for way in (" recomputed", "") for one in ADAPTERS]
TITLES = {"bone": "MiSS", "bat": "BAT", "lora": "LoRA", "recomputed": "checkpointed"}
"""Word of a column -> what the table calls it."""
PLACES = [("one process", 1), ("DDP", 8), ("FSDP2", 8), ("FSDP2", 64), ("tensor parallel", 8)]
SMALLEST = "Llama-1B"
"""Its users need neither 4 bits nor shards."""
ROWS = [(SMALLEST, 16, place) for place in PLACES[:2]]
ROWS += itertools.product(list(CONFIGS)[1:-1], (16, 4), PLACES)
TWO = ("DDP", 2)
KEPT = "--gradient_checkpointing false"
"""The flag that keeps activations: on a GPU, the command computes them again without it."""
RECIPES = (
    (SMALLEST, 16, PLACES[0], "bone", f"--bits bf16 {KEPT}"),
    (SMALLEST, 16, PLACES[0], "bone recomputed", "--bits bf16 --gradient_checkpointing"),
    (SMALLEST, 16, PLACES[1], "bone", f"--bits bf16 {KEPT}"),
    ("Llama-8B", 4, PLACES[0], "bone recomputed", "--bits 4 --gradient_checkpointing"),
    ("Llama-8B", 16, PLACES[0], "bone recomputed", "--bits bf16 --gradient_checkpointing"),
    ("Llama-8B", 16, PLACES[0], "bone", f"--bits bf16 {KEPT}"),
    ("Llama-8B", 4, TWO, "bone recomputed", "--bits 4 --gradient_checkpointing"),
    ("Llama-8B", 16, TWO, "bone recomputed", "--bits bf16 --gradient_checkpointing"),
    ("Llama-8B", 16, PLACES[1], "bone recomputed", "--bits bf16 --gradient_checkpointing"),
    ("Llama-8B", 16, PLACES[1], "bone", f"--bits bf16 {KEPT}"),
    ("Llama-8B", 16, PLACES[2], "bone", f"--bits bf16 {KEPT} --fsdp full_shard"),
    ("Llama-70B", 4, PLACES[0], "bone recomputed", "--bits 4 --gradient_checkpointing"),
    ("Llama-70B", 4, PLACES[2], "bone recomputed",
     "--bits 4 --gradient_checkpointing --fsdp full_shard"),
    ("Llama-70B", 16, PLACES[2], "bone recomputed",
     "--bits bf16 --gradient_checkpointing --fsdp full_shard"),
)  # fmt: skip
"""Base, bits, place and way of a recipe, and its flags."""
GPUS, SHARE = (24, 48, 80), 0.9
"""Memory of GPUs in GiB, which are sold by as many GB, and the share of it that a step may take."""
CUT = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ColwiseParallel)
CUT |= dict.fromkeys(("o_proj", "down_proj"), RowwiseParallel)


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


def last_part(path: str) -> str:
    """Return the name of a module in its parent."""
    return path.rpartition(".")[2]


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


def make_mesh(ranks: int) -> Any:
    """Return the mesh of all ranks."""
    with unset_fake_temporarily():  # it reads the numbers of its ranks
        return init_device_mesh("cpu", (ranks,))


def make_simulated(config: Any, bits: int) -> Any:
    """Return a base without values."""
    return make_without_values(config, bits, ATTENTION)


def make_real(config: Any, bits: int) -> Any:
    """Return a base with values."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
    if bits == 4:
        four_bits.quantize(model, model.dtype)
        model.is_loaded_in_4bit = True  # PEFT asks
    return model


def make_step(
    make_base: Callable[[Any, int], Any],
    ranks: int,
    name: str,
    adapter: str,
    way: str,
    bits: int,
    recompute: bool,
    r: int,
) -> tuple[Any, torch.optim.Optimizer]:
    """Return a model with an adapter, on its ranks, and an optimizer."""
    model = make_base(CONFIGS[name], bits).train()
    if recompute:
        model.activation_checkpointing_enable()
    layers = [one for one in model.modules() if type(one).__name__.endswith("DecoderLayer")]
    if way == "tensor parallel":
        mesh = make_mesh(ranks)
        for layer in layers:
            names = [path for path, _ in layer.named_modules() if last_part(path) in CUT]
            parallelize_module(layer, mesh, {path: CUT[last_part(path)]() for path in names})
    model = adapt(model, adapter, r)
    if way == "DDP":  # its first communication compares values
        model = DistributedDataParallel(model, init_sync=False)
        model.register_comm_hook(None, noop_hook)
    if way == "FSDP2":
        mesh = make_mesh(ranks)
        for module in (*layers, model):
            fully_shard(module, mesh=mesh)
    return model, torch.optim.AdamW(one for one in model.parameters() if one.requires_grad)


def simulated(ranks: int, rows: int, tokens: int, *of_model: Any) -> dict[str, int]:
    """Return the bytes of a step on the first of so many ranks, by what they are for."""
    modes = fake, tracker = memory_modes()
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    with pretend_group(ranks):
        with fake, tracker:
            model, optimizer = make_step(make_simulated, ranks, *of_model)
            gc.collect()  # what was quantised is in cycles
        return step_memory(model, optimizer, lambda: model(input_ids=ids, labels=ids).loss, modes)


def real(rank: int, ranks: int, file: str, found: Any, *of_model: Any) -> None:
    """Measure a step of a small model on a rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    model, optimizer = make_step(make_real, ranks, *of_model)
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


def peaks(kept: Mapping[str, Any]) -> str:
    """Return the table of the peak of each model, way and adapter."""
    rows = []
    for name, bits, (way, ranks) in ROWS:
        cells = [kept.get(f"{name}, {bits} bits, {way}, {ranks}, {one}") for one in COLUMNS]
        shown = [f"{one['peak'] / 2**30:.1f}" if one else NOTHING for one in cells]
        if any(cells):
            rows.append([f"{name}:{bits}", f"{way.replace(' ', '-')}:{ranks}", *shown])
    titles = [" ".join(TITLES[word] for word in column.split()) for column in COLUMNS]
    return re.sub(r" ?\| ?", "|", table(["model:bits", "devices", *titles], rows))


def recipes(kept: Mapping[str, Any]) -> str:
    """Return the table of the guide: flags, memory, and the GPUs that it fits."""
    rows = []
    for name, bits, (way, ranks), column, flags in RECIPES:
        found = kept[f"{name}, {bits} bits, {way}, {ranks}, {column}"]
        peak, more = found["peak"] / 2**30, found["activations"] / 2**30
        fits = [str(size) for size in GPUS if peak <= SHARE * size]
        how = "1" if ranks == 1 else f"{ranks}, {way}"
        row = [name, how, f"`{flags}`", f"{peak:.1f}", f"{more:.1f}", ", ".join(fits) or "none"]
        rows.append(row)
    header = [
        "base",
        "GPUs",
        "flags",
        "GiB for one example",
        "each further example, at most",
        "fits GPUs of (GB)",
    ]
    return table(header, rows)


def main() -> None:
    kept: dict[str, Any] = json.loads(RESULTS.read_text())
    cases = [(*row, column) for row, column in itertools.product(ROWS, COLUMNS)]
    cases += [recipe[:4] for recipe in RECIPES]
    for name, bits, (way, ranks), column in cases:
        adapter, _, recompute = column.partition(" ")
        key = f"{name}, {bits} bits, {way}, {ranks}, {column}"
        uncut = way == "tensor parallel" and (adapter == "lora" or bits == 4 or name[0] == "M")
        unknown = name[0] == "M" and (adapter == "bat" or (adapter, bits) == ("lora", 4))
        if not (key in kept or uncut or unknown):  # the page says why
            kept[key] = simulated(ranks, 1, 2048, name, adapter, way, bits, bool(recompute), R)
            RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
            print(key, kept[key], flush=True)


if __name__ == "__main__":
    main()
