"""`python -m tests.forks ADDRESS WORDS...`: `disha WORDS...`, in a process that needs no imports.

Importing torch, transformers and trl takes longer than most runs of a test. So that a launcher can
start ranks without it, `preloaded` starts a process that has imported all, and that waits at a
socket. There the command runs in a fork, with the variables, the folder and the streams of here.
"""

import contextlib
import gc
import importlib.util
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Client, Connection, Listener
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path

from tests.processes import ROOT, started

STREAMS = (0, 1, 2)
"""The file descriptors of input, output and errors."""


@contextlib.contextmanager
def preloaded() -> Iterator[str]:
    """Start a process that has imported all; give its address, and end it with all its forks."""
    with tempfile.TemporaryDirectory() as folder:
        address = str(Path(folder, "socket"))
        process = started(["-c", f"from tests.forks import serve; serve({address!r})"], ROOT)
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        yield address
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def serve(address: str) -> None:
    """Import all, and answer what asks for the command, each time in a fork."""
    import disha.finetune.train  # noqa: F401

    if importlib.util.find_spec("deepspeed") is not None:  # not each platform has it
        import deepspeed  # noqa: F401

    gc.freeze()  # trainers ask for collections, which would search all modules again and again
    fork = multiprocessing.get_context("fork")
    with Listener(address) as listener:
        print("waiting", flush=True)
        while True:
            with listener.accept() as asked:
                fork.Process(target=answer, args=(asked,)).start()


def answer(asked: Connection) -> None:
    """Run the command for what is at the other end, and send its exit code there."""
    words, variables, folder = asked.recv()
    streams = [recv_handle(asked) for _ in STREAMS]
    fork = multiprocessing.get_context("fork")
    command = fork.Process(target=run, args=(words, variables, folder, streams))
    command.start()
    command.join()
    asked.send(command.exitcode)


def run(
    words: Sequence[str], variables: Mapping[str, str], folder: str, streams: Sequence[int]
) -> None:
    """Run `python -m disha`, with these variables, in this folder, and with these streams."""
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    for stream, given in zip(STREAMS, streams, strict=True):
        os.dup2(given, stream)
    sys.argv = ["disha", *words]
    runpy.run_module("disha", run_name="__main__", alter_sys=True)


def ask(address: str, words: Sequence[str]) -> int:
    """Have the command run; return its exit code."""
    with Client(address) as server:
        server.send((words, dict(os.environ), os.getcwd()))
        for stream in STREAMS:
            send_handle(server, stream, None)
        return server.recv()


if __name__ == "__main__":
    sys.exit(ask(sys.argv[1], sys.argv[2:]))
