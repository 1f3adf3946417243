"""The command on several processes, without the seconds that torchrun takes to start each."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch._dynamo  # which takes a second, when the first optimizer is made
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp

from disha.cli import main
from tests.processes import FORKED

SECONDS = 240


def run_together(count: int, words: Sequence[str], log: Path) -> str:
    """Run the command on `count` processes, which must go well, and return what they print.

    Args:
        count: how many.
        words: what follows `disha`.
        log: the file for all that they print.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        FORKED.Process(target=_run_one, args=(rank, count, port, list(words), log))
        for rank in range(count)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(SECONDS)
        process.kill()
    assert [process.exitcode for process in started] == [0] * count, log.read_text()
    return log.read_text()


def _run_one(rank: int, count: int, port: int, words: list[str], log: Path) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        CUDA_VISIBLE_DEVICES="",
    )
    torch.set_num_threads(1)
    with log.open("a") as file:
        for standard in (1, 2):
            os.dup2(file.fileno(), standard)
    sys.exit(main(words))
