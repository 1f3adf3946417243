"""What `disha finetune --dry_run` shows: the plan, the rows, and the memory of a step.

No weight is read: the base is made from its configuration, of tensors that have no values. The step
is the trainer's, with the dtype, the quantised storage and the recomputation that the device would
have. The operations are those of a processor, whose kernels for attention keep as much as those of
a GPU.

| on several devices | how it is simulated |
|---|---|
| DDP | by torch's own class, in a group that communicates nothing |
| FSDP2 | by `fully_shard`, on the modules on which accelerate calls it |
| DeepSpeed ZeRO | one process is simulated, and its parts are divided as ZeRO divides them |
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from trl.trainer import utils as trl_utils

import disha
from disha.finetune.trainer import TILE, Trainer, score_positions
from disha.integrations.memory import memory_modes, step_memory
from disha.text import counted

SIZES = (8, 12, 16, 24, 32, 40, 48, 80, 141)
"""The memory of devices that people have, in GiB."""

AIM = 24
"""The memory of a device that a step should fit, in GiB; else `judge` says what does."""

TAKEN, LOST = 2**30, 0.05
"""What a device's runtime takes for itself, and the share that is lost between tensors."""

SHARDED_DEVICES = (2, 4, 8)

SCORED = ("log_probs", "entropy", "is_top1")
"""What trl asks of the head in training."""

TILE_OF_TRL = 32768
"""How many columns of the head trl multiplies at a time on an accelerator."""

MOST_LIVE = 1_000_000_000
"""DeepSpeed's default of `stage3_max_live_parameters`."""

Parts = dict[str, int]
MakeModel = Callable[[str, Any], Any]


@dataclass(frozen=True)
class Step:
    """What decides the memory of a step on each device."""

    bits: str
    rows: int
    recomputes: bool
    devices: int
    engine: str  # "" for one process, or "DDP", "FSDP2", "ZeRO-0" to "ZeRO-3"


def preview(trainer: Trainer, bits: str, make_model: MakeModel) -> None:
    """Print the plan, one example, the steps, the memory of a step, and what it fits.

    `make_model` returns the adapted model for a number of bits, in a mode without values.
    """
    training = trainer.args
    print(disha.summary(trainer.model))
    row = trainer.train_dataset[0]
    print(f"\none of {counted(len(trainer.train_dataset), 'row')}; [[ ]] marks what is learned:")
    print(_mark_learned(row["input_ids"], row["labels"], trainer.processing_class))
    *_, steps = trainer.set_initial_training_values(training, trainer.get_train_dataloader())
    print(f"\n{counted(steps, 'step')}; one needs on each device, simulated:")
    asked = _step_of(training, bits)
    simulate = _simulation_of(trainer, make_model)
    try:
        parts = simulate(asked)
    except Exception as error:  # not every operation and optimizer knows tensors without memory
        print(f"unknown: {type(error).__name__}: {error}")
        return
    for part, size in parts.items():
        print(f"{part:12}{size / 2**20:10,.1f} MiB")
    print(judge(asked, parts["peak"], simulate))


def _simulation_of(trainer: Trainer, make_model: MakeModel) -> Simulation:
    """Return what simulates steps with the first batch of a trainer, which has the longest rows."""
    training = trainer.args
    optimizer, options = Trainer.get_optimizer_cls_and_kwargs(training)
    autocast = None
    if training.bf16 or training.fp16:
        autocast = torch.float16 if training.fp16 else torch.bfloat16
    tile = TILE_OF_TRL
    if training.simulated_device.type == "cpu":
        tile = TILE
    return Simulation(
        batch=next(iter(trainer.get_train_dataloader())),
        make_model=make_model,
        make_optimizer=partial(optimizer, **options),
        autocast=autocast,
        recomputing=training.gradient_checkpointing_kwargs,
        tile=tile,
        zero=_read_zero(training),
    )


def _step_of(training: Any, bits: str) -> Step:
    """Return what the flags ask for."""
    devices = training.dry_run_devices
    engine = "DDP" if devices > 1 else ""
    if training.simulated_fsdp:
        engine = "FSDP2"
    if training.simulated_deepspeed:
        engine = f"ZeRO-{_read_zero(training).get('stage', 0)}"
    recomputes = training.gradient_checkpointing
    return Step(bits, training.per_device_train_batch_size, recomputes, devices, engine)


def _read_zero(training: Any) -> dict[str, Any]:
    """Return DeepSpeed's settings of ZeRO, empty without DeepSpeed."""
    given = training.simulated_deepspeed
    if not given:
        return {}
    if not isinstance(given, dict):
        given = json.loads(Path(given).read_text(encoding="utf-8"))
    settings: dict[str, Any] = given.get("zero_optimization", {})
    return settings


def _mark_learned(ids: list[int], labels: list[int], tokenizer: Any) -> str:
    text = ""
    pairs = zip(ids, labels, strict=True)
    for learned, run in itertools.groupby(pairs, key=lambda pair: pair[1] != -100):
        part = tokenizer.decode([token for token, _ in run])
        text += f"[[{part}]]" if learned else part
    return text


# --- simulating ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Simulation:
    """What all simulated steps of a run share."""

    batch: Mapping[str, Tensor]
    make_model: MakeModel
    make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]
    autocast: torch.dtype | None = None
    recomputing: Mapping[str, Any] | None = None
    tile: int = TILE
    zero: Mapping[str, Any] = field(default_factory=dict)
    """The part of DeepSpeed's settings that is on ZeRO."""

    def __call__(self, step: Step) -> Parts:
        """Return the bytes of a step on each device, as if every token were learned."""
        modes = memory_modes()
        fake, _ = modes
        rows = {name: value[: step.rows] for name, value in self.batch.items()}
        with pretend_group(step.devices):
            model = prepare(self.make_model(step.bits, fake), step, self.recomputing)
            called = distribute(model, step, fake)
            gc.collect()  # what was quantised is in cycles
            trained = [value for value in called.parameters() if value.requires_grad]

            def loss_of() -> Tensor:
                with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
                    return called(**rows, fused_lm_head=True).loss

            # Which positions are learned depends on values, and simulated tensors have none.
            with score_positions(only_learned=False, tile=self.tile):
                parts = step_memory(called, self.make_optimizer(trained), loss_of, modes)
        if step.engine.startswith("ZeRO"):
            parts = _partition(parts, model, step, self.zero)
        return parts


def prepare(model: Any, step: Step, recomputing: Mapping[str, Any] | None = None) -> Any:
    """Return a model as the trainer trains it."""
    if step.recomputes:
        model.gradient_checkpointing_enable(recomputing)
    trl_utils.add_fused_lm_head(model, outputs=SCORED)
    return model.train()


@contextmanager
def pretend_group(devices: int) -> Iterator[None]:
    """Let this process be the first of several, which communicate nothing."""
    if devices == 1:
        yield
        return
    dist.init_process_group("fake", rank=0, world_size=devices)
    try:
        yield
    finally:
        dist.destroy_process_group()


def distribute(model: Any, step: Step, mode: AbstractContextManager[Any]) -> Any:
    """Return the model on the first of its devices, in a mode without values or in none."""
    if step.engine == "DDP":
        with mode:
            model = DistributedDataParallel(model, init_sync=False)  # syncing would compare values
            model.register_comm_hook(None, noop_hook)
    if step.engine == "FSDP2":
        mesh = init_device_mesh("cpu", (step.devices,))
        with mode:
            _shard_as_accelerate(model, mesh)
    return model


def _shard_as_accelerate(model: Any, mesh: Any) -> None:
    """Shard each decoder layer, the table, the last norm with the head, and what is left.

    accelerate 1.15 does so (`fsdp2_prepare_model`). Its own function would ask quantised weights
    for a state.
    """
    names = set(model._no_split_modules or ())
    for module in list(model.modules()):
        if type(module).__name__ in names:
            fully_shard(module, mesh=mesh)
    table = model.get_input_embeddings()
    head = model.get_output_embeddings()
    norms = [child for child in model.base_model.children() if "Norm" in type(child).__name__]
    last = [*norms[-1:], head]
    if set(table.parameters()) & set(head.parameters()):  # tied
        last.insert(-1, table)
    else:
        fully_shard(table, mesh=mesh)
    fully_shard(last, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)


def _partition(parts: Parts, model: nn.Module, step: Step, zero: Mapping[str, Any]) -> Parts:
    """Return the parts of one process as DeepSpeed divides them among devices.

    Each stage divides the optimizer's state, and keeps float32 copies of what trains beside it.
    Stage 2 also divides the gradients, and stage 3 the weights. Stage 3 gathers weights as they are
    read, and releases them when more than a number of values would be in memory.
    """
    stage, devices = int(step.engine[-1]), step.devices
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    values = sum(parameter.numel() for parameter in trained)
    divided = dict(parts)
    if stage >= 1:
        divided["optimizer"] = (parts["optimizer"] + 4 * values) // devices
    if stage >= 2:
        divided["gradients"] = parts["gradients"] // devices
    if stage == 3:
        divided["weights"] = parts["weights"] // devices
        divided["adapter"] = parts["adapter"] // devices
        most = zero.get("stage3_max_live_parameters", MOST_LIVE)
        most = MOST_LIVE if most == "auto" else most
        weights = sum(parameter.numel() for parameter in model.parameters())
        gathered = (parts["weights"] + parts["adapter"]) * min(1.0, most / weights)
        divided["activations"] += int(gathered)
    divided["peak"] = sum(divided[name] for name in divided if name != "peak")
    return divided


# --- the verdict ---------------------------------------------------------------------------------


def count_needed_gib(peak: int) -> float:
    """Return the memory in GiB that a device must have for a peak."""
    return (peak * (1 + LOST) + TAKEN) / 2**30


def judge(asked: Step, peak: int, simulate: Simulation) -> str:
    """Return which device the step fits, and what to change so that it fits one of AIM GiB."""
    fitting = [size for size in SIZES if size >= count_needed_gib(peak)]
    if count_needed_gib(peak) <= AIM:
        return f"fits {fitting[0]} GB"
    verdict = f"does not fit {AIM} GB"
    if fitting:
        verdict += f", but {fitting[0]} GB"
    for changed in _changes(asked):
        if changed == asked:
            continue
        changed_peak = simulate(changed)["peak"]
        if count_needed_gib(changed_peak) <= AIM:
            flags = " ".join(_flags(asked, changed))
            return f"{verdict}; fits {AIM} GB with {flags} ({changed_peak / 2**30:.1f} GiB)"
    return f"{verdict}; neither recomputing, 4 bits nor {SHARDED_DEVICES[-1]} devices are enough"


def _changes(asked: Step) -> Iterator[Step]:
    """Yield steps that need less memory, the smallest changes first."""
    recomputing = dataclasses.replace(asked, recomputes=True)
    packed = dataclasses.replace(asked, bits="4")
    both = dataclasses.replace(recomputing, bits="4")
    yield from (recomputing, packed, both, dataclasses.replace(both, rows=1))
    for devices in SHARDED_DEVICES:
        if devices > asked.devices or not asked.engine:
            sharded = dataclasses.replace(recomputing, devices=devices, engine="FSDP2")
            yield from (sharded, dataclasses.replace(sharded, bits="4", rows=1))


def _flags(asked: Step, changed: Step) -> Iterator[str]:
    """Yield the flags that turn one step into the other."""
    if changed.recomputes != asked.recomputes:
        yield "--gradient_checkpointing true"
    if changed.bits != asked.bits:
        yield f"--bits {changed.bits}"
    if changed.rows != asked.rows:
        yield f"--per_device_train_batch_size {changed.rows}"
    if (changed.engine, changed.devices) != (asked.engine, asked.devices):
        yield f"--fsdp full_shard on {changed.devices} devices"
