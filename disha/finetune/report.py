"""What a run tells of itself when it has ended: samples, environment, and files written whole."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import disha
from disha.finetune.errors import OutputError

__all__ = [
    "Sample",
    "environment",
    "peak_memory",
    "samples_page",
    "write_file",
]

REPORTED_PACKAGES = ("torch", "safetensors", "einops", "gguf", "tokenizers", "numpy")


@dataclass(frozen=True)
class Sample:
    """One prompt with what the model made of it before and after training, and the reference."""

    query: str
    before: str
    after: str
    reference: str


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; an earlier one stays until the new one is complete.

    Raises:
        OutputError: it can't be written.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"{path} can't be written: {error.strerror}") from error


def samples_page(samples: Sequence[Sample], origin: str) -> str:
    """A Markdown page of prompts with the texts before and after training.

    Args:
        samples: what to show.
        origin: where the prompts are from, such as "held-out".
    """
    parts = [f"# Before and after\n\nPrompts from the {origin} rows; greedy decoding.\n"]
    for number, sample in enumerate(samples, start=1):
        parts.append(f"## Sample {number}\n")
        parts.append(_titled("Prompt", sample.query))
        parts.append(_titled("Before", sample.before))
        parts.append(_titled("After", sample.after))
        parts.append(_titled("Reference", sample.reference))
    return "\n".join(parts)


def environment() -> dict[str, Any]:
    """Versions of what computes, and the machine it runs on."""
    versions = {name: importlib.metadata.version(name) for name in REPORTED_PACKAGES}
    has_cuda = torch.cuda.is_available()
    return {
        "versions": {"python": platform.python_version(), "disha": disha.__version__, **versions},
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if has_cuda else "cpu",
        },
    }


def peak_memory() -> int | None:
    """The most memory this process had resident so far, in bytes; None where unknown."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _titled(title: str, text: str) -> str:
    # A fence longer than any in the text, so that the text can't end it.
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"**{title}**\n\n{fence}text\n{text.strip()}\n{fence}\n"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
