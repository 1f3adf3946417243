"""The sizes of every table, and the time that each may take."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch

from benchmarks.layouts import LAYOUTS
from benchmarks.protocol import Budget

__all__ = [
    "FINETUNE_RUNS",
    "FULL",
    "QUICK",
    "ExpertModel",
    "FinetuneSizes",
    "LayerSize",
    "ModelRun",
    "Profile",
    "R",
]

R = 64
"""The shard size of every table; LoRA gets the rank with as many trainable parameters."""


@dataclass(frozen=True)
class LayerSize:
    """A square linear layer, and the number of tokens in its input."""

    width: int
    tokens: int
    dtype: torch.dtype


@dataclass(frozen=True)
class ModelRun:
    """A training step of the whole model: `batch` sequences of `length` tokens.

    It needs no warm-up: the check that each candidate learns is a step already.

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
class ExpertModel:
    """A mixture of experts, and the batch of one step.

    Args:
        architecture: the prefix of its classes in transformers.
        hidden: width of a token.
        inner: width inside an expert.
        experts: how many a layer has.
        chosen: how many each token goes to.
        r: the shard size.
        length: tokens in each sequence.
        inner_name: what the configuration calls `inner`.
        experts_name: what it calls `experts`.
        batched: whether the implementation batched_mm is measured too.
        layers: how many.
        batch: number of sequences.
    """

    architecture: str
    hidden: int
    inner: int
    experts: int
    chosen: int
    r: int
    length: int
    inner_name: str
    experts_name: str
    batched: bool = False
    layers: int = 1
    batch: int = 1


@dataclass(frozen=True)
class FinetuneSizes:
    """What the benchmark of `disha finetune` trains.

    Args:
        layers: how many of the model's decoder layers the loop is measured on.
        batch: sequences in a batch.
        accumulation: batches in a step.
        length: tokens in each sequence.
        budget: of measuring the loop.
        steps: optimizer steps of each run of the command.
        held_out: rows that a run measures the loss on.
        runs: title -> the flags of the command.
    """

    layers: int
    batch: int
    accumulation: int
    length: int
    budget: Budget
    steps: int
    held_out: int
    runs: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class SideBySide:
    """What `disha finetune` and the scripts of others train.

    Args:
        steps: optimizer steps of each.
        batch: rows in a batch.
        length: most tokens in a row.
        rounds: how often each trains.
        held_out: rows that the loss is measured on, beside those that are trained on.
        words: of the vocabulary whose loss is measured.
        tokens: that the loss is measured on.
        dtypes: of the model.
        contestants: who takes part.
        is_tiny: whether the model is a tiny one.
    """

    steps: int
    batch: int
    length: int
    rounds: int
    held_out: int
    words: int
    tokens: int
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    contestants: tuple[str, ...] = ("disha", "disha_padded", "peft_miss", "peft_lora")
    is_tiny: bool = False


@dataclass(frozen=True)
class Profile:
    """All settings of a run of the benchmarks. A budget is for each case of a table."""

    name: str
    layer_steps: tuple[LayerSize, ...]
    layer_step_budget: Budget
    rates_budget: Budget
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
    routed_samples: int
    routed_adapters: tuple[int, ...]
    routed_tokens: tuple[int, ...]
    routed_budget: Budget
    loaded_adapters: int
    switched_adapters: int
    expert_models: tuple[ExpertModel, ...]
    expert_budget: Budget
    finetune: FinetuneSizes
    side_by_side: SideBySide
    compiled_layouts: tuple[str, ...]
    compiled_width: int
    compiled_candidates: tuple[str, ...]
    compiled_layers: tuple[LayerSize, ...]
    compiled_models: tuple[ModelRun, ...]
    compiled_budget: Budget

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


_MIXTRAL = ("intermediate_size", "num_local_experts")
_QWEN3 = ("moe_intermediate_size", "num_experts")

FINETUNE_RUNS: Mapping[str, tuple[str, ...]] = {
    "Bone": ("--init_weights", "True"),
    "BAT": ("--init_weights", "bat"),
    "QBone, 8 bits": ("--bits", "8"),
    "QBone, 4 bits (nf4)": ("--bits", "4"),
}

FULL = Profile(
    name="full",
    layer_steps=(
        LayerSize(2048, 1024, torch.float32),
        LayerSize(1024, 2048, torch.float32),
        LayerSize(4096, 512, torch.bfloat16),
        LayerSize(1024, 1024, torch.bfloat16),
    ),
    layer_step_budget=Budget(50.0, least_rounds=7, most_rounds=100),
    rates_budget=Budget(4.0, least_rounds=7, most_rounds=40),
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
    model_step_budget=Budget(105.0, least_rounds=5, most_rounds=40, warm_up=0),
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
    routed_samples=64,
    routed_adapters=(1, 8, 64),
    routed_tokens=(1, 32),
    routed_budget=Budget(8.0, least_rounds=5, most_rounds=100),
    loaded_adapters=1000,
    switched_adapters=64,
    expert_models=(
        ExpertModel("Mixtral", 512, 1024, 8, 2, 64, 512, *_MIXTRAL),
        ExpertModel("Qwen3Moe", 512, 256, 32, 4, 32, 512, *_QWEN3),
        ExpertModel("Mixtral", 256, 512, 8, 2, 32, 128, *_MIXTRAL, batched=True),
    ),
    expert_budget=Budget(20.0, least_rounds=7, most_rounds=60),
    finetune=FinetuneSizes(
        layers=30,
        batch=4,
        accumulation=1,
        length=128,
        budget=Budget(60.0, least_rounds=10, most_rounds=40, warm_up=1),
        steps=10,
        held_out=32,
        runs=FINETUNE_RUNS,
    ),
    side_by_side=SideBySide(
        steps=8, batch=4, length=256, rounds=2, held_out=16, words=128_000, tokens=1024
    ),
    compiled_layouts=tuple(name for name, whole in LAYOUTS.items() if whole.compiles),
    compiled_width=256,
    compiled_candidates=("frozen", "bone", "bat", "peft_miss", "peft_lora"),
    compiled_layers=(
        LayerSize(1024, 1024, torch.float32),
        LayerSize(1024, 1024, torch.bfloat16),
    ),
    compiled_models=(ModelRun(torch.float32, batch=1, length=64, layers=2),),
    compiled_budget=Budget(20.0, least_rounds=5, most_rounds=60, warm_up=1),
)

QUICK = Profile(
    name="quick",
    layer_steps=(
        LayerSize(512, 256, torch.float32),
        LayerSize(512, 256, torch.bfloat16),
    ),
    layer_step_budget=Budget(4.0, least_rounds=3, most_rounds=20),
    rates_budget=Budget(0.5, least_rounds=2, most_rounds=10, warm_up=1),
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
    routed_samples=8,
    routed_adapters=(1, 4),
    routed_tokens=(1,),
    routed_budget=Budget(1.0, least_rounds=2, most_rounds=10),
    loaded_adapters=20,
    switched_adapters=8,
    expert_models=(ExpertModel("Mixtral", 128, 256, 4, 2, 16, 64, *_MIXTRAL, batched=True),),
    expert_budget=Budget(2.0, least_rounds=2, most_rounds=5),
    finetune=FinetuneSizes(
        layers=1,
        batch=1,
        accumulation=1,
        length=32,
        budget=Budget(2.0, least_rounds=2, most_rounds=5, warm_up=1),
        steps=1,
        held_out=2,
        runs={"Bone": FINETUNE_RUNS["Bone"]},
    ),
    side_by_side=SideBySide(
        steps=3,
        batch=2,
        length=64,
        rounds=1,
        held_out=2,
        words=4000,
        tokens=300,
        dtypes=("float32",),
        is_tiny=True,
    ),
    compiled_layouts=("linear (out in)",),
    compiled_width=128,
    compiled_candidates=("frozen", "bone", "peft_miss"),
    compiled_layers=(LayerSize(256, 64, torch.float32),),
    compiled_models=(),
    compiled_budget=Budget(1.0, least_rounds=2, most_rounds=10),
)
