"""The memory that a dry run simulates, beside what the allocator gives out on two processors.

    python -m benchmarks.dry_run           # a Llama of 134 million parameters, some minutes
    python -m benchmarks.dry_run --tiny    # a tiny one, to try the command; it keeps nothing

Each engine trains the same model with MiSS on short rows, in float32, with the functions of
`disha finetune --dry_run` on one side, and two processes on the other. The real figure is the most
that lives at one time on the first rank in the third step: weights, adapter, gradients, the
optimizer's state, activations, and what the engine keeps for itself. Results are kept as JSON, and
`benchmarks/results/memory.md` gets its table from them.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoModelForCausalLM, LlamaConfig

import disha
from benchmarks.four_bits import quantize
from benchmarks.markdown import NOTHING, bytes_text, ratio_text, table
from benchmarks.results import read_results, versions, write_results, write_whole
from benchmarks.steps import full_step
from disha.finetune.base import make_without_values
from disha.finetune.dry_run import Simulation, Step, distribute, prepare
from disha.finetune.trainer import score_positions

LARGE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
         "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}  # fmt: skip
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 512}  # fmt: skip
ROWS, TOKENS, R = 2, 64, 16
STEPS = {
    "one process": Step("fp32", ROWS, False, 1, ""),
    "one process, recomputed": Step("fp32", ROWS, True, 1, ""),
    "one process, 4 bits": Step("4", ROWS, False, 1, ""),
    "DDP": Step("fp32", ROWS, False, 2, "DDP"),
    "FSDP2": Step("fp32", ROWS, False, 2, "FSDP2"),
    "FSDP2, recomputed": Step("fp32", ROWS, True, 2, "FSDP2"),
    "ZeRO-1": Step("fp32", ROWS, False, 2, "ZeRO-1"),
    "ZeRO-2": Step("fp32", ROWS, False, 2, "ZeRO-2"),
    "ZeRO-3": Step("fp32", ROWS, False, 2, "ZeRO-3"),
}
RESULTS = Path(__file__).parent / "results" / "dry-run.json"
PAGE = Path(__file__).parent / "results" / "memory.md"
MARK = "<!-- written by python -m benchmarks.dry_run -->"
END = "<!-- end -->"
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "bitsandbytes")
MEASURED = "the measured step"
ZERO = {"reduce_bucket_size": 1_000_000, "stage3_prefetch_bucket_size": 1_000_000}
"""Settings of ZeRO. By default, its buffers are larger than this model."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate and measure each engine, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dry_run")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the command")
    parser.add_argument("--only", nargs="+", choices=list(STEPS), default=list(STEPS))
    asked = parser.parse_args(arguments)
    sizes = TINY if asked.tiny else LARGE
    kept = {} if asked.tiny else read_results(RESULTS)["engines"]
    for name in asked.only:
        simulated, real = simulate(STEPS[name], sizes)["peak"], measure(STEPS[name], sizes)
        kept[name] = {"simulated": simulated, "measured": real}
        print(name, kept[name], flush=True)
        if not asked.tiny:
            write(kept)
    print(compare(kept))


def write(kept: dict[str, dict[str, int]]) -> None:
    """Write the results, and the table on the page."""
    write_results(RESULTS, {"versions": versions(PACKAGES), "engines": kept})
    start, _, rest = PAGE.read_text(encoding="utf-8").partition(MARK)
    write_whole(PAGE, f"{start}{MARK}\n\n{compare(kept)}\n{END}{rest.partition(END)[2]}")


def compare(kept: dict[str, dict[str, int]]) -> str:
    """Return a table of what was simulated and measured of each engine."""
    rows = []
    for name in STEPS:
        if name not in kept:
            rows.append([name, NOTHING, NOTHING, NOTHING])
            continue
        simulated, real = kept[name]["simulated"], kept[name]["measured"]
        rows.append([name, bytes_text(simulated), bytes_text(real), ratio_text(simulated / real)])
    return table(["", "simulated", "measured", "simulated / measured"], rows)


def simulate(step: Step, sizes: dict[str, int]) -> dict[str, int]:
    """Return what the dry run says of a step."""

    def make_model(bits: str, fake: Any) -> Any:
        with fake:
            return adapt(make_without_values(LlamaConfig(**sizes), bits, torch.float32))

    return Simulation(batch(), make_model, torch.optim.AdamW, zero=ZERO)(step)


def adapt(model: Any) -> Any:
    """Return a model with an adapter on all linear layers but the head."""
    return disha.inject_adapters(model, "all-linear", R, exclude=["lm_head"])


def batch() -> dict[str, torch.Tensor]:
    """Return rows in which every token is learned, without padding."""
    ids = torch.ones(ROWS, TOKENS, dtype=torch.long)
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


# --- the real step -------------------------------------------------------------------------------


def measure(step: Step, sizes: dict[str, int]) -> int:
    """Return the most bytes that live on the first rank in its third step."""
    queue = mp.get_context("fork").SimpleQueue()  # the ranks import nothing again
    with tempfile.TemporaryDirectory() as folder:
        given = (step, sizes, f"{folder}/ranks", queue)
        mp.start_processes(work, given, nprocs=step.devices, start_method="fork")
    return int(queue.get())


def work(rank: int, step: Step, sizes: dict[str, int], file: str, found: Any) -> None:
    """Train on one rank."""
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": step.devices}  # DeepSpeed asks
    os.environ.update({name: str(value) for name, value in ranks.items()})
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=step.devices
    )
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        train = make_step(step, sizes)
        train()
        train()
        gc.collect()
        with record_function(MEASURED):
            train()
    if rank == 0:
        found.put(peak_within(recorded))
    dist.barrier()
    dist.destroy_process_group()


def make_step(step: Step, sizes: dict[str, int]) -> Callable[[], object]:
    """Return a complete training step of a model with values, on this rank."""
    config = LlamaConfig(**sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if step.bits == "4":
        model = quantize(model, model.dtype)
    model = prepare(adapt(model), step)
    rows = batch()
    if step.engine.startswith("ZeRO"):
        return zero_step(model, step, rows)
    with warnings.catch_warnings(action="ignore"):
        called = distribute(model, step, nullcontext())
    optimizer = torch.optim.AdamW([one for one in called.parameters() if one.requires_grad])

    def loss_of() -> torch.Tensor:
        with score_positions(only_learned=False):
            return called(**rows, fused_lm_head=True).loss

    return full_step(loss_of, optimizer)


def zero_step(model: Any, step: Step, rows: dict[str, torch.Tensor]) -> Callable[[], object]:
    """Return a training step of DeepSpeed."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first
    trained = list(disha.adapter_parameters(model))
    settings = {
        "train_micro_batch_size_per_gpu": ROWS,
        "zero_optimization": {"stage": int(step.engine[-1]), **ZERO},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW(trained)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=trained, optimizer=optimizer, config=settings
    )

    def run() -> None:
        with score_positions(only_learned=False):
            loss = engine(**rows, fused_lm_head=True).loss
        engine.backward(loss)
        engine.step()

    return run


def peak_within(recorded: Any) -> int:
    """Return the most bytes that live at one time from the beginning of the measured step."""
    events = recorded.profiler.kineto_results.events()
    (began,) = [event.start_ns() for event in events if event.name() == MEASURED]
    memory = [event for event in events if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(memory, key=lambda event: event.start_ns()):
        live += event.nbytes()
        if event.start_ns() >= began:
            peak = max(peak, live)
    return peak


if __name__ == "__main__":
    main()
