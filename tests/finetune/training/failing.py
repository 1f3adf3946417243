"""Two processes of which one fails on its own, or none. `test_parallel.py` runs it."""

from __future__ import annotations

import gc
import sys
import weakref

import torch

import disha
from disha.finetune.errors import DataError, PeerError, SettingsError
from disha.finetune.training.loop import training_steps
from disha.finetune.training.parallel import Processes, distribute, joined_processes
from tests.finetune.training.tiny import objective, plan, source


def fail_on_data(processes: Processes) -> None:
    if processes.rank == 1:
        raise DataError("rows.jsonl, line 3 is no JSON")
    processes.barrier()


def fail_on_memory(processes: Processes) -> None:
    shared = distribute(objective(), "ddp", processes)
    for step in training_steps(shared, source(), plan(max_steps=5), processes=processes):
        if step.step == 2 and processes.rank == 1:
            shared.module.forward = lambda batch: torch.empty(1 << 60)


def fail_alike(processes: Processes) -> None:
    raise SettingsError("--learning_rate must be greater than 0")


WRAPPED: list[weakref.ref[torch.nn.Module]] = []


def end_well(processes: Processes) -> None:
    gc.disable()
    shared = distribute(objective(), "ddp", processes)
    shared.itself = [shared]
    WRAPPED.append(weakref.ref(shared))


def main(case: str) -> int:
    try:
        with joined_processes() as processes:
            globals()[case](processes)
    except PeerError as error:
        print(f"silent: {error}")
        return 1
    except disha.DishaError as error:
        print(f"error: {error}", flush=True)
        return 1
    if any(wrapped() is not None for wrapped in WRAPPED):
        print("error: what wraps the model is still there", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
