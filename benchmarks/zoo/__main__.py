"""Try adapters in one tiny model of every architecture.

    python -m benchmarks.zoo --library timm --only '^res' --out zoo.json

Each model runs in its own child process, with limited time and memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import resource
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.zoo.cases import Case, NotRun
from benchmarks.zoo.report import failed, text, write
from benchmarks.zoo.trial import Result, trial

LIBRARIES = ("transformers", "timm", "torchvision", "diffusers")
MEMORY = 9 << 30


def main() -> int:
    """Run the selected trials; return 1 if any failed."""
    arguments = _parser().parse_args()
    _quiet()
    chosen = _cases(arguments.library or LIBRARIES, arguments.only)[: arguments.limit]
    started = time.monotonic()
    results: list[Result] = []
    for result in _run_all(chosen, arguments.jobs, arguments.seconds):
        results.append(result)
        results.sort(key=lambda r: (LIBRARIES.index(r.library), r.name))
        _show(result, len(results), len(chosen))
        if arguments.out:  # after each, so that a stopped run keeps its results
            took = round(time.monotonic() - started, 1)
            write(results, arguments.out, versions=_versions(), seconds=took)
    print(text(results))
    print(f"\n{len(results)} architectures in {time.monotonic() - started:.0f} s")
    return 1 if failed(results) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument("--library", action="append", choices=LIBRARIES, help="all by default")
    parser.add_argument("--only", default="", metavar="REGEX", help="names of architectures")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N only")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes at a time")
    parser.add_argument("--seconds", type=float, default=60.0, help="limit of each trial")
    parser.add_argument("--out", type=Path, metavar="PATH", help="JSON file to write")
    return parser


def _quiet() -> None:
    """Keep libraries from downloading files, warning, and using several threads."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(1)


def _cases(libraries: Iterable[str], only: str) -> list[Case]:
    from importlib.util import find_spec

    from benchmarks.zoo import models_diffusers, models_transformers, models_vision

    found: list[Case] = []
    libraries = [name for name in libraries if find_spec(name) is not None]
    if "transformers" in libraries:
        import transformers
        from transformers import modeling_utils  # noqa: F401 - once, instead of in each child

        transformers.logging.set_verbosity_error()

        found += models_transformers.cases()
    if {"timm", "torchvision"} & set(libraries):
        found += models_vision.cases()
    if "diffusers" in libraries:
        from diffusers.models import autoencoders, controlnets, transformers, unets  # noqa: F401

        found += models_diffusers.cases()
    return [c for c in found if c.library in libraries and re.search(only, c.name)]


# --- one child for each --------------------------------------------------------------------------


@dataclass
class _Child:
    case: Case
    process: Any
    receiver: Connection
    started: float


def _run_all(todo: list[Case], jobs: int, seconds: float) -> Iterator[Result]:
    """Yield the results as they arrive."""
    waiting, children = list(todo), list[_Child]()
    while waiting or children:
        while waiting and len(children) < max(jobs, 1):
            children.append(_start(waiting.pop(0)))
        ready = multiprocessing.connection.wait([c.receiver for c in children], timeout=0.5)
        for child in list(children):
            result = _collect(child, child.receiver in ready, seconds)
            if result is None:
                continue
            children.remove(child)
            yield result


def _start(case: Case) -> _Child:
    # Forked, so that libraries are imported once. No thread is running yet.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(case, sender), daemon=True)
    process.start()
    sender.close()
    return _Child(case, process, receiver, time.monotonic())


def _collect(child: _Child, ready: bool, seconds: float) -> Result | None:
    """Return a child's result if it has one or its time is over."""
    took = time.monotonic() - child.started
    result = Result(child.case.library, child.case.name, seconds=round(took, 1))
    if ready:
        try:
            result = child.receiver.recv()
            result.seconds = round(took, 1)
        except EOFError:
            child.process.join()
            result.fail("not run", f"the process ended with code {child.process.exitcode}")
    elif took > seconds:
        result.fail("not run", f"took more than {seconds:.0f} s")
    else:
        return None
    child.process.kill()
    child.process.join()
    child.receiver.close()
    return result


def _work(case: Case, sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    result = Result(case.library, case.name)
    try:
        built = case.build()
        result.note = built.note
        trial(built, result)
    except NotRun as error:
        result.fail("not run", str(error))
    except MemoryError as error:
        result.fail("not run", f"out of memory: {error}")
    except Exception as error:
        result.fail("exception", f"the trial itself: {type(error).__name__}: {error}")
    sender.send(result)


def _show(result: Result, done: int, total: int) -> None:
    why = f": {result.reasons[0][:150]}" if result.reasons else ""
    line = f"[{done}/{total}] {result.library} {result.name} {result.status}{why}"
    print(line, file=sys.stderr, flush=True)


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", *LIBRARIES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
