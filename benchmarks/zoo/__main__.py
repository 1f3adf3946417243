"""Try adapters in one tiny model of every architecture.

    python -m benchmarks.zoo --only '^timm res' --out bench-output/zoo.json

Each model runs in its own child process, with limited time and memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.results import versions, write_whole
from benchmarks.zoo.cases import Case, NotRun
from benchmarks.zoo.trial import STATUSES, Result, trial

LIBRARIES = ("transformers", "timm", "torchvision", "diffusers")
FAILURES = ("silent", "wrong", "exception")
"""What must not happen; a refusal says why, and a model that does not run says nothing."""
JOBS, SECONDS, MEMORY = 2, 180.0, 9 << 30
"""Processes at a time, and the limits of each."""


def main() -> int:
    """Run the selected trials; return 1 if any failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument("--only", default="", metavar="REGEX", help="of library and name")
    parser.add_argument("--out", type=Path, default=Path("bench-output/zoo.json"))
    asked = parser.parse_args()
    _quiet()
    chosen = [case for case in _cases() if re.search(asked.only, f"{case.library} {case.name}")]
    started = time.monotonic()
    results: list[Result] = []
    for result in _run_all(chosen):
        results.append(result)
        results.sort(key=lambda r: (LIBRARIES.index(r.library), r.name))
        print(f"[{len(results)}/{len(chosen)}] {_line(result)}", file=sys.stderr, flush=True)
        _write(results, asked.out, time.monotonic() - started)  # a stopped run keeps its results
    for result in results:
        if result.status != "held":
            print(_line(result))
    for library in LIBRARIES:
        found = Counter(result.status for result in results if result.library == library)
        print(f"{library}: {', '.join(f'{found[one]} {one}' for one in STATUSES)}")
    return 1 if any(result.status in FAILURES for result in results) else 0


def _quiet() -> None:
    """Keep libraries from downloading files, warning, and using several threads."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


def _cases() -> list[Case]:
    # Libraries are imported once, instead of in each child.
    from diffusers.models import autoencoders, controlnets, transformers, unets  # noqa: F401
    from transformers import modeling_utils  # noqa: F401

    from benchmarks.zoo import models_diffusers, models_transformers, models_vision

    return [*models_transformers.cases(), *models_vision.cases(), *models_diffusers.cases()]


def _line(result: Result) -> str:
    why = "; ".join(reason[:230] for reason in result.reasons[:2])
    return f"{result.library} {result.name} {result.status}{why and ': '}{why}"


def _write(results: Sequence[Result], path: Path, seconds: float) -> None:
    """Write everything to a JSON file, with one line for each result."""
    about = json.dumps({"versions": versions(("torch", *LIBRARIES)), "seconds": round(seconds, 1)})
    lines = ",\n".join(json.dumps(asdict(result)) for result in results)
    write_whole(path, f'{about[:-1]}, "results": [\n{lines}\n]}}\n')


# --- one child for each --------------------------------------------------------------------------


def _run_all(cases: list[Case]) -> Iterator[Result]:
    """Yield the results as they arrive, of so many children at a time."""
    with ThreadPoolExecutor(JOBS) as pool:
        for future in as_completed([pool.submit(_result_of, case) for case in cases]):
            yield future.result()


def _result_of(case: Case) -> Result:
    """Try a case in a child, and return what it sends, or why it sends nothing."""
    started = time.monotonic()
    context = multiprocessing.get_context("fork")  # so that libraries are imported once
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(case, sender), daemon=True)
    child.start()
    sender.close()
    result = Result(case.library, case.name)
    if not receiver.poll(SECONDS):
        result.fail("not run", f"took more than {SECONDS:.0f} s")
    else:
        try:
            result = receiver.recv()
        except EOFError:
            child.join()
            result.fail("not run", f"the process ended with code {child.exitcode}")
    child.kill()
    child.join()
    result.seconds = round(time.monotonic() - started, 1)
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
    except (NotRun, MemoryError) as error:
        result.fail("not run", str(error))
    except Exception as error:
        result.fail("exception", f"the trial itself: {type(error).__name__}: {error}")
    sender.send(result)


if __name__ == "__main__":
    sys.exit(main())
