"""What is measured: the sizes of every table and the time that each may take."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch

from benchmarks.protocol import Budget

__all__ = ["FULL", "QUICK", "LayerSize", "ModelRun", "Profile", "R"]

R = 64
"""The shard size of every table; LoRA gets the rank with as many trainable parameters."""


@dataclass(frozen=True)
class LayerSize:
    """A square linear layer and the tokens it is given."""

    width: int
    tokens: int
    dtype: torch.dtype


@dataclass(frozen=True)
class ModelRun:
    """A training step of the whole model: `batch` sequences of `length` tokens.

    It needs no warm-up: the check that each candidate learns is one step of it.

    Args:
        dtype: of all weights and adapters.
        batch: number of sequences.
        length: tokens in each.
        layers: how many of the model's decoder layers are kept.
    """

    dtype: torch.dtype
    batch: int
    length: int
    layers: int


@dataclass(frozen=True)
class Profile:
    """Everything that a run of the benchmarks is set to; budgets are for each case of a table."""

    name: str
    product_width: int
    layer_steps: tuple[LayerSize, ...]
    layer_step_budget: Budget
    few_tokens: tuple[LayerSize, ...]
    few_tokens_budget: Budget
    model_steps: tuple[ModelRun, ...]
    model_step_budget: Budget
    memory_layers: int
    memory_width: int
    memory_tokens: int
    resident_width: int
    resident_tokens: int
    resident_candidates: tuple[str, ...]
    many_layers: int
    adapter_layers: tuple[int, ...]
    start_up_budget: Budget
    routed_width: int
    routed_tokens: tuple[int, ...]
    routed_budget: Budget

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes of its cases."""
        cases = (*self.layer_steps, *self.few_tokens, *self.model_steps)
        return tuple(dict.fromkeys(case.dtype for case in cases))

    def without(self, dtypes: Collection[torch.dtype]) -> Profile:
        """Return this profile without the cases of some dtypes."""
        return replace(
            self,
            layer_steps=tuple(one for one in self.layer_steps if one.dtype not in dtypes),
            few_tokens=tuple(one for one in self.few_tokens if one.dtype not in dtypes),
            model_steps=tuple(one for one in self.model_steps if one.dtype not in dtypes),
        )


FULL = Profile(
    name="full",
    product_width=2048,
    layer_steps=(
        LayerSize(2048, 1024, torch.float32),
        LayerSize(1024, 2048, torch.float32),
        LayerSize(4096, 512, torch.bfloat16),
        LayerSize(1024, 1024, torch.bfloat16),
    ),
    layer_step_budget=Budget(60.0, least_rounds=7, most_rounds=100),
    few_tokens=tuple(
        LayerSize(2048, tokens, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for tokens in (1, 4, 8, 16)
    ),
    few_tokens_budget=Budget(12.0, least_rounds=20, most_rounds=150, warm_up=5),
    model_steps=(
        ModelRun(torch.float32, batch=1, length=512, layers=30),
        ModelRun(torch.bfloat16, batch=2, length=512, layers=30),
    ),
    model_step_budget=Budget(170.0, least_rounds=5, most_rounds=40, warm_up=0),
    memory_layers=4,
    memory_width=1024,
    memory_tokens=512,
    resident_width=2048,
    resident_tokens=2048,
    resident_candidates=("frozen", "bone", "bat", "peft_miss", "peft_bat", "peft_lora", "loralib"),
    many_layers=1000,
    adapter_layers=(4, 16, 64),
    start_up_budget=Budget(10.0, least_rounds=5, most_rounds=20, warm_up=1),
    routed_width=1024,
    routed_tokens=(1, 32),
    routed_budget=Budget(8.0, least_rounds=5, most_rounds=100),
)

QUICK = Profile(
    name="quick",
    product_width=512,
    layer_steps=(
        LayerSize(512, 256, torch.float32),
        LayerSize(512, 256, torch.bfloat16),
    ),
    layer_step_budget=Budget(4.0, least_rounds=3, most_rounds=20),
    few_tokens=(LayerSize(512, 1, torch.float32), LayerSize(512, 8, torch.bfloat16)),
    few_tokens_budget=Budget(2.0, least_rounds=5, most_rounds=30),
    model_steps=(ModelRun(torch.float32, batch=1, length=64, layers=2),),
    model_step_budget=Budget(8.0, least_rounds=2, most_rounds=5, warm_up=0),
    memory_layers=4,
    memory_width=256,
    memory_tokens=512,
    resident_width=512,
    resident_tokens=2048,
    resident_candidates=("frozen", "bone", "bat"),
    many_layers=100,
    adapter_layers=(2, 4),
    start_up_budget=Budget(3.0, least_rounds=1, most_rounds=3, warm_up=1),
    routed_width=256,
    routed_tokens=(1,),
    routed_budget=Budget(1.0, least_rounds=2, most_rounds=10),
)
