"""Several processes that train one model, under torchrun, with gloo (CPU) and nccl (CUDA).

Without torchrun there is one process, which does not use `torch.distributed`.

A failure on one process stops all of them, and only the process that failed first prints a message.
It leaves a note in the store that torchrun's processes share. When it has ended, the collectives of
the others fail. They find the note and print nothing.
"""

from __future__ import annotations

import gc
import inspect
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from disha import DishaError
from disha.finetune.errors import PeerError, SettingsError, TrainingError
from disha.finetune.models.decoder import Decoder
from disha.finetune.settings import Strategy
from disha.finetune.stopping import Interrupted, noted_signal, raising, wait_for_first
from disha.finetune.training.layers import repeated_layers
from disha.finetune.training.objectives import Objective

__all__ = [
    "Processes",
    "deferred_reduction",
    "distribute",
    "gathered",
    "is_sharded",
    "joined_processes",
    "undistributed",
]

T = TypeVar("T")

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The environment variables that torchrun sets for each process."""

FAILURE = "disha/failure"
"""The store's key for the note of the first process that failed."""

LAST_WAIT = 0.2
"""Seconds to wait after the last collective, so that gloo's threads can end."""


@dataclass(frozen=True)
class Processes:
    """The processes that train together, seen from one of them.

    Args:
        rank: the number of this process, from 0.
        world_size: how many there are.
        device: the device that this process computes on.
    """

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def alone(cls, device: torch.device | None = None) -> Processes:
        """Return one process on a device: by default the first GPU, or the CPU if there is none."""
        return cls(0, 1, _device(0) if device is None else device)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints messages."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all processes, in float64."""
        if self.world_size == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(summed)
        return summed.tolist()

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank; anything that can be pickled."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """Return the main process's value; anything that can be pickled."""
        if self.world_size == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]  # type: ignore[no-any-return]

    def on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on the main process. All processes return its result or raise its error."""
        result: Any = None
        if self.is_main:
            try:
                result = action()
            except (OSError, DishaError) as error:
                result = error
        result = self.broadcast(result)
        if isinstance(result, (OSError, DishaError)):
            raise result
        return result  # type: ignore[no-any-return]

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.gather(None)

    def check_signals(self) -> None:
        """Raise `Interrupted` on every process if a signal asked one of them to stop."""
        number = noted_signal()
        [asked] = self.sum([float(number is not None)])
        if asked:
            raise Interrupted(number or signal.SIGTERM)

    def interruptible(self) -> AbstractContextManager[None]:
        """Let a signal raise inside the block, unless there are several processes.

        Several processes must stop at the same place, which is where they call `check_signals`.
        """
        return raising(self.world_size == 1)


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the processes that torchrun has started. Without torchrun, this is the only process.

    Do all work inside this context, so that a failure on one process stops all.

    Raises:
        SettingsError: torchrun's environment variables are incomplete, or there are more processes
            than GPUs.
        PeerError: another process failed, and says why.
    """
    if _world_size() == 1:
        yield Processes.alone()
        return
    processes, store = _join()
    try:
        yield processes
    except Exception as error:
        # The group is not destroyed. That hangs if other processes wait for something else.
        _tell(store, processes, error)
        raise
    except KeyboardInterrupt as interruption:  # raised on all processes after the same step
        traceback.clear_frames(interruption.__traceback__)
        _leave()
        if not processes.is_main:
            raise PeerError("stopped; rank 0 says more") from interruption
        raise
    _leave()


def _leave() -> None:
    # Wrapped models refer to the group, and are part of reference cycles. If the group still exists
    # when Python ends, its threads may call into Python, which aborts the process.
    gc.collect()
    dist.destroy_process_group()
    # Some threads of gloo live on, and return the tensors of the last collective once they get
    # Python's lock. If Python ended before that, the process would abort.
    time.sleep(LAST_WAIT)


def _world_size() -> int:
    found = os.environ.get("WORLD_SIZE", "1")
    if not found.isdecimal() or int(found) == 0:
        raise SettingsError(
            f"the environment variable WORLD_SIZE must be the number of processes, got {found!r}; "
            "unset it, or start with torchrun --nproc-per-node N -m disha finetune ..."
        )
    return int(found)


def _join() -> tuple[Processes, Any]:
    missing = [name for name in TORCHRUN if name not in os.environ]
    if missing:
        raise SettingsError(
            f"WORLD_SIZE is set, but not {', '.join(missing)}; start several processes with "
            "torchrun --nproc-per-node N -m disha finetune ..., or unset WORLD_SIZE"
        )
    device = _device(int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # gloo as well as nccl, so that processes exchange CPU tensors without waiting for the GPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, rank, world_size = next(rendezvous("env://"))
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    return Processes(rank, world_size, device), store


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise SettingsError(
            f"there is no GPU for process {local_rank + 1} of this machine, which has "
            f"{torch.cuda.device_count()}; lower --nproc-per-node"
        )
    return torch.device("cuda", local_rank)


def _tell(store: Any, processes: Processes, error: Exception) -> None:
    """Leave a note that this process failed first; raise if another process has left one."""
    note = f"rank {processes.rank}: {error}"
    try:
        first = store.compare_set(FAILURE, "", note).decode()
    except (RuntimeError, dist.DistError):  # the process that kept the store is gone
        first = "another process, which is gone"
    if first != note:
        wait_for_first()
        raise PeerError(f"stopped, because training failed on {first}") from error


# --- models --------------------------------------------------------------------------------------


def distribute(objective: Objective, strategy: Strategy, processes: Processes) -> nn.Module:
    """Return the module to train instead of `objective`, which shares the work between processes.

    Call it after adapters are injected and gradient checkpointing and compilation are set up. All
    processes get rank 0's values of the parameters to train.

    - ddp: every process has the complete model, and gradients are averaged.
    - fsdp: every process has a part of each parameter, layer by layer (FSDP2); the objective stays
      the same object. Frozen parameters may have another type than trained ones.

    Args:
        objective: the objective, with its model on `processes.device`.
        strategy: ddp or fsdp.
        processes: the processes that take part; a single process gets `objective` back.

    Raises:
        SettingsError: the model can't be sharded.
        TrainingError: the model differs between the processes.
    """
    if processes.world_size == 1:
        return objective
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    _require_same_everywhere(trained, processes)
    for parameter in trained.values():
        dist.broadcast(parameter.data, src=0)
    if strategy == "fsdp":
        _require_one_type(trained)
        return _sharded(objective, processes)
    # By default, DDP sends the frozen model first, and all buffers before every forward.
    return nn.parallel.DistributedDataParallel(
        objective,
        init_sync=False,
        **_WITHOUT_BUFFERS,
        find_unused_parameters=not isinstance(objective.model, Decoder),
    )


_BUFFERS = ("forward_sync_buffers", "broadcast_buffers")  # the newer name first
_KNOWN = inspect.signature(nn.parallel.DistributedDataParallel).parameters
_WITHOUT_BUFFERS: dict[str, Any] = {next(name for name in _BUFFERS if name in _KNOWN): False}


def _sharded(objective: Objective, processes: Processes) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(processes.device.type, (processes.world_size,))
    for layer in repeated_layers(objective.model):
        fully_shard(layer, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    return objective


def _require_same_everywhere(trained: dict[str, nn.Parameter], processes: Processes) -> None:
    shapes = processes.gather({name: (tuple(p.shape), p.dtype) for name, p in trained.items()})
    if any(others != shapes[0] for others in shapes):
        raise TrainingError(
            "the processes have different parameters to train; make the model the same on all of "
            "them, whatever their rank"
        )


def _require_one_type(trained: dict[str, nn.Parameter]) -> None:
    types = sorted({str(p.dtype).removeprefix("torch.") for p in trained.values()})
    if len(types) > 1:
        raise SettingsError(
            f"--strategy fsdp trains parameters of one type, but those to train are "
            f"{' and '.join(types)}: adapters are float32, and --also_train parameters are as "
            "--bits says; use --bits fp32 or --strategy ddp"
        )


def undistributed(objective: nn.Module) -> Objective:
    """Return the objective inside a module that `distribute` returned."""
    inner = (
        objective.module
        if isinstance(objective, nn.parallel.DistributedDataParallel)
        else objective
    )
    if not isinstance(inner, Objective):
        raise TypeError(f"an Objective is expected, not {type(inner).__name__}")
    return inner


def is_sharded(objective: nn.Module) -> bool:
    """Return whether each process has only a part of the parameters."""
    return any(hasattr(parameter, "full_tensor") for parameter in objective.parameters())


def gathered(tensor: Tensor) -> Tensor:
    """Return a tensor, gathered if it is sharded. Call it on all processes."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def deferred_reduction(objective: nn.Module) -> AbstractContextManager[None]:
    """Keep gradients in each process inside the block. The next backward after it reduces them."""
    if isinstance(objective, nn.parallel.DistributedDataParallel):
        return objective.no_sync()
    set_sync = getattr(objective, "set_requires_gradient_sync", None)
    return nullcontext() if set_sync is None else _without_sync(set_sync)


@contextmanager
def _without_sync(set_sync: Any) -> Iterator[None]:
    set_sync(False)
    try:
        yield
    finally:
        set_sync(True)
