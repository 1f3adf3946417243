"""What each rank of a run loads, and the engines that shard a base among them."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import DistributedType
from accelerate.utils import enable_fsdp_ram_efficient_loading
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_enabled

from disha.finetune.base import make_on_meta
from disha.finetune.flags import FEW_BITS
from disha.finetune.source import is_gguf


def is_sharded(training: Any) -> bool:
    """Whether an engine shards the base of a run among the ranks."""
    return bool(training.fsdp) or is_deepspeed_zero3_enabled()  # type: ignore[no-untyped-call]


def loading_device(name: str, bits: str, training: Any) -> torch.device | None:
    """Return the device that a rank loads the base onto; None where an engine shards the base.

    | engine | who reads the base |
    |---|---|
    | FSDP | the first rank of each machine; the others are on meta until the base is sharded |
    | ZeRO-3 | the first rank, as `transformers` has it |
    | others, and bases of few bits | each rank, onto its device |
    """
    if not is_sharded(training) or bits in FEW_BITS:
        return training.device
    if is_gguf(name):
        return None
    if training.fsdp and "cpu_ram_efficient_loading" not in training.fsdp_config:
        _let_first_rank_load(name, training)
    if is_fsdp_enabled() and training.local_process_index > 0:
        return torch.device("meta")
    return None


def _let_first_rank_load(name: str, training: Any) -> None:
    """Let FSDP shard a base that one rank of each machine reads, where accelerate can.

    accelerate 1.15 gives the other ranks floating-point parameters, and no buffers.
    """
    made = make_on_meta(name)
    parameters = dict(made.named_parameters(remove_duplicate=False))
    if made.state_dict().keys() <= parameters.keys():
        training.fsdp_plugin_args["cpu_ram_efficient_loading"] = True
        enable_fsdp_ram_efficient_loading()


def start_engine_on_processors(training: Any) -> None:
    """Let processors shard the base, which accelerate begins on accelerators only."""
    if training.fsdp:
        training.distributed_state.distributed_type = DistributedType.MULTI_GPU
    if training.deepspeed:
        import deepspeed

        # DeepSpeed would compile this kernel, which takes a minute and needs a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
