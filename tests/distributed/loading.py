"""`python -m tests.distributed.loading BASE FOLDER FLAG...`, as a rank of torchrun: load a base.

Each rank writes how many bytes of host memory loading took at most, and how many are left. Pages of
files are not counted, because Linux drops them where memory is short.
"""

import json
import os
import re
import sys
import threading
from pathlib import Path

from disha.finetune.arguments import parse_flags
from disha.finetune.base import load_base, loading_device


def held():
    """Return the bytes of memory that this process holds, without those of files."""
    [kilobytes] = re.findall(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


class Watch:
    """Notes the most memory that this process holds, from a thread of its own."""

    def __init__(self):
        self.before = self.peak = held()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self):
        while not self.done.wait(0.002):
            self.peak = max(self.peak, held())

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()


def main(base, folder, *flags):
    words = ["--base", base, "--output_dir", folder, "--learning_rate", "0.1", *flags]
    adapter, _, training = parse_flags(words)
    with Watch() as watch:
        model, _ = load_base(base, adapter.bits, loading_device(adapter.bits, training))
    found = {"peak": watch.peak - watch.before, "left": held() - watch.before}
    path = Path(folder, f"rank{os.environ['RANK']}.json")
    path.write_text(json.dumps(found))
    del model


if __name__ == "__main__":
    main(*sys.argv[1:])
