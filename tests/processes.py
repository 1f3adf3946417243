"""Python in a process of its own, which ends with all that it has started, such as ranks."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent

RANKS = 2


def environment() -> dict[str, str]:
    """Return the variables of such a process."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        # Where there is a device, fully_shard and DeepSpeed take it, and gloo can't.
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }


def started(arguments: Sequence[str], folder: Path | None = None) -> subprocess.Popen[str]:
    """Start Python with these arguments, in a folder."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Wait for the end; of one that takes longer, and of what it has started, it comes at once."""
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        errors += f"\nit took more than {seconds} s"
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)
