"""`python -m tests.distributed FOLDER SCRIPT...`: run the checks of scripts, each on two ranks.

The ranks get the variables of torchrun. They are forks of this process, which has imported the
scripts, because importing torch takes longer than most checks.
"""

import gc
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from tests.conftest import leave_guards_untimed
from tests.distributed.harness import run_checks
from tests.processes import RANKS


def run_on_ranks(run: Callable[..., None], *arguments: Any, count: int = RANKS) -> bool:
    """Call a function on each rank, wait for all, and return whether all have ended well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    os.environ["LOCAL_WORLD_SIZE"] = str(count)
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=as_rank, args=(rank, run, arguments)) for rank in range(count)]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join()
    return all(one.exitcode == 0 for one in ranks)


def on_ranks(script: ModuleType | SimpleNamespace, folder: Path) -> None:
    """Run the checks of a script on its number of ranks, and wait for all."""
    folder.mkdir(parents=True)
    run_on_ranks(run_checks, vars(script), folder, count=getattr(script, "RANKS", RANKS))


def as_rank(rank: int, run: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    run(*arguments)


def import_for_all_ranks() -> None:
    """Compile something, so that no rank imports again what this takes seconds to import."""
    leave_guards_untimed()
    torch.compile(torch.nn.Linear(1, 1), backend="eager")(torch.ones(1))
    torch._dynamo.reset()


if __name__ == "__main__":
    import_for_all_ranks()
    scripts = [import_module(f"tests.distributed.{name}") for name in sys.argv[2:]]
    for script in scripts:
        if hasattr(script, "import_for_all_ranks"):
            script.import_for_all_ranks()
    gc.freeze()  # trainers ask for collections, which would search all modules again and again
    for script, name in zip(scripts, sys.argv[2:], strict=True):
        on_ranks(script, Path(sys.argv[1]) / name)
