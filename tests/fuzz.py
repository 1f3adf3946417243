"""Fuzz the readers of `tests.fuzzing`, guided by the code that inputs reach.

`python -m tests.fuzz 3600` fuzzes all readers, one after the other, for an hour each, and
`python -m tests.fuzz 3600 header` one of them. It prints what was found, and how many inputs were
read. `--keep` puts the inputs that reach new code into `tests/corpus.xz`.

Without `atheris` (`pip install --group fuzz`), inputs are made by chance.
"""

import argparse
import random
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

try:
    import atheris
except ImportError:
    atheris = None

instrumented = nullcontext() if atheris is None else atheris.instrument_imports(include=["disha"])
with instrumented:
    import torch

    from tests import fuzzing

READERS = fuzzing.readers()


def fuzz(reader: str, seconds: int, folder: Path) -> None:
    """Fuzz a reader until this process ends; leave in a folder what reached new code."""
    for number, data in enumerate(fuzzing.corpus_of(reader)):
        (folder / f"seed{number}").write_bytes(data)
    found = set[str]()

    def read(data: bytes) -> None:
        said = fuzzing.check(READERS[reader], fuzzing.from_bytes(data))
        if said is not None and said.partition(": ")[0] not in found:
            found.add(said.partition(": ")[0])
            print(f"{reader}: {said}\n{data[:2000]!r}", flush=True)

    def change(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        value = fuzzing.from_bytes(data)
        if isinstance(value, bytes) or rng.random() < 0.02:
            return atheris.Mutate(data, most)
        changed = fuzzing.to_bytes(fuzzing.mutate(value, rng))
        return changed if len(changed) <= most else data

    flags = ("-max_len=20000", "-timeout=60", "-rss_limit_mb=8000", "-print_final_stats=1")
    words = [sys.argv[0], str(folder), f"-max_total_time={seconds}", *flags, "-len_control=0"]
    atheris.Setup(words, read, custom_mutator=change)
    atheris.Fuzz()


def fuzz_in_process(reader: str, seconds: int) -> list[bytes]:
    """Fuzz a reader in a process of its own, and return the inputs that reached new code."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.fuzz", str(seconds), reader, "--into", folder]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        for line in done.stderr.splitlines():
            if "number_of_executed_units" in line or "ERROR" in line:
                print(f"{reader}: {line}", flush=True)
        return [path.read_bytes() for path in sorted(Path(folder).iterdir())]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", type=int)
    parser.add_argument("reader", nargs="?", choices=READERS)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    if flags.into is not None:
        fuzz(flags.reader, flags.seconds, flags.into)
    for name in [flags.reader] if flags.reader else READERS:
        if atheris is None:
            count, wrong = fuzzing.replay(name, flags.seconds, seed=random.randrange(2**32))
            print(f"{name}: {count} inputs by chance; {wrong or 'nothing wrong'}", flush=True)
            continue
        inputs = fuzz_in_process(name, flags.seconds)
        if flags.keep:
            fuzzing.save_corpus({**fuzzing.load_corpus(), name: inputs})
