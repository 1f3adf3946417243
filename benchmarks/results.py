"""The file of results: the measurements, the machine and the versions; and how it is filled."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import disha

PACKAGES = ("torch", "peft", "loralib", "lycoris-lora", "bitsandbytes", "transformers", "numpy",
            "safetensors")  # fmt: skip
DIGITS = 4


def describe(device: torch.device) -> dict[str, Any]:
    """Return the beginning of a file of results, without tables."""
    on_gpu = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "machine": {
            "system": platform.system(),
            "processor": _processor(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_bytes": _memory_bytes(),
        },
        "versions": {
            "python": platform.python_version(),
            "disha": disha.__version__,
            **versions(PACKAGES),
        },
        "tables": {},
        "table_seconds": {},
    }


def measure(
    tables: Mapping[str, Callable[[], Iterable[Mapping[str, Any]]]],
    results: dict[str, Any],
    path: Path,
) -> int:
    """Measure tables into a file; return 1 if one failed. It is noted why, and the rest goes on."""
    results["failed"] = {}
    for name, make in tables.items():
        started = time.perf_counter()
        try:
            for case in make():
                results["tables"].setdefault(name, []).append(case)
                write_results(path, results)  # a run that ends here keeps what it has
                release()
        except Exception as error:
            results["failed"][name] = reason(error)
            release()
        results["table_seconds"][name] = time.perf_counter() - started
        write_results(path, results)
        print(f"{name}: {results['table_seconds'][name]:.0f} s", flush=True)
    for name, why in results["failed"].items():
        print(f"{name} failed: {why}", file=sys.stderr)
    print(f"results: {path}")
    return 1 if results["failed"] else 0


def release() -> None:
    """Give memory back that nothing holds any more, the compiler's too."""
    torch._dynamo.reset()
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def reason(error: Exception) -> str:
    """Return the first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def dtype_text(dtype: torch.dtype) -> str:
    """Return the name of a dtype, as a case has it."""
    return str(dtype).removeprefix("torch.")


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write results as JSON, with each list of numbers on one line."""
    text = json.dumps(rounded(results), indent=1, allow_nan=False)
    text = re.sub(
        r"\[\s+([^\[\]{}\"]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text
    )
    write_whole(path, text + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file completely or not at all, and make the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read_results(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def rounded(value: Any, digits: int = DIGITS) -> Any:
    """Return a structure with every float rounded to a number of significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {key: rounded(one, digits) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one, digits) for one in value]
    return value


def _memory_bytes() -> int | None:
    """Return the bytes of the machine's memory; None if the system does not tell, as Windows."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()
