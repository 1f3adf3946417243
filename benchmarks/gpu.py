"""Everything that is to be measured on a GPU, in one command.

    python -m benchmarks.gpu                 # or make gpu, which also writes the tables of the page
    python -m benchmarks.gpu --device cpu    # tiny sizes, to try the command

| table | what it holds |
|---|---|
| tests | how many of the tests for accelerators pass (`pytest -m cuda`) |
| step | a training step of a layer, eager and compiled; what it keeps and allocates |
| decoding | a forward of few tokens through several layers, eager and compiled |
| model | a training step of SmolLM2-135M, eager and compiled |
| finetune | `disha finetune` with SmolLM2-135M, from the flags to the proven file |

With several cards, `CUDA_VISIBLE_DEVICES` chooses one.

On CUDA, events take the time. The clock rate is brought up before each case, the cache is cleared
before each measurement, and all candidates run once in each round, in a new random order. What
fails, such as a candidate that does not fit the memory, is noted with its reason; the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.candidates import BASE
from benchmarks.layers import Size, layer_case
from benchmarks.protocol import Budget, R, slow_dtypes
from benchmarks.race import Race
from benchmarks.results import describe, measure
from benchmarks.roofline import Linear, measured_rates
from benchmarks.whole_model import ModelRun, model_case, write_model

TIMED = (BASE, "bone", "bat", "lora", "peft_miss", "peft_lora", "loralib")
ROOT = Path(__file__).parent.parent
REPORTED = ("losses", "training_losses", "seconds", "steps", "proof", "parameters")
SETTINGS = ("bits", "bf16", "fp16", "learning_rate", "max_length", "per_device_train_batch_size",
            "gradient_checkpointing", "r")  # fmt: skip
"""What is kept of the report of a fine-tuning."""
Case = dict[str, Any]


class Sizes(NamedTuple):
    """How much is measured."""

    name: str
    layers: Sequence[Linear]
    tokens: Sequence[int]
    few_tokens: Sequence[int]
    copies: int
    """Layers of a forward of few tokens. Together they do not fit into a cache."""
    model: tuple[int, int, int]
    """Rows, tokens of a row, decoder layers."""
    steps: int
    """Of the fine-tuning."""
    rows: int | None
    """Of the demo, for the fine-tuning; all if None."""
    budget: Budget
    times: int
    """Forwards of few tokens in a measurement."""
    warm_seconds: float
    r: int
    tests: Sequence[str]


FULL = Sizes(
    "full",
    layers=(Linear(4096, 4096), Linear(4096, 14336)),
    tokens=(512, 1024, 2048, 4096, 8192),
    few_tokens=(1, 2, 4, 8, 16),
    copies=8,
    model=(8, 1024, 30),
    steps=200,
    rows=None,
    budget=Budget(5.0, least_rounds=20, most_rounds=200, warm_up=5),
    times=10,
    warm_seconds=1.0,
    r=R,
    tests=("-m", "cuda"),
)
TINY = Sizes(
    "tiny",
    layers=(Linear(64, 96),),
    tokens=(16,),
    few_tokens=(1,),
    copies=2,
    model=(2, 16, 1),
    steps=2,
    rows=16,
    budget=Budget(0.0, least_rounds=15, warm_up=3),
    times=2,
    warm_seconds=0.0,
    r=8,
    tests=("-m", "cuda", "tests/whole/test_accelerators.py", "-k", "no_bit"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line names, and return 1 if something failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, as on a processor")
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--out", type=Path, default=Path("bench-output/gpu.json"))
    asked = parser.parse_args(arguments)
    if asked.device.index is not None:  # the tests and the fine-tuning would take another card
        parser.error("name no card in --device; set CUDA_VISIBLE_DEVICES")
    sizes = TINY if asked.tiny or asked.device.type == "cpu" else FULL
    results = describe(asked.device) | {"sizes": sizes.name, "accelerator": about(asked.device)}
    tables = {name: partial(TABLES[name], asked.device, sizes) for name in asked.only}
    return measure(tables, results, asked.out)


def default_device() -> torch.device:
    """Return the accelerator of this machine, or the processor if there is none."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if device is None else device


def about(device: torch.device) -> dict[str, Any]:
    """Return what is known of an accelerator; nothing of a processor."""
    if device.type != "cuda":
        return {}
    card = torch.cuda.get_device_properties(device)
    return {
        "name": card.name,
        "memory_bytes": card.total_memory,
        "multiprocessors": card.multi_processor_count,
        "capability": f"{card.major}.{card.minor}",
        "runtime": torch.version.cuda or torch.version.hip,
    }


def dtype_of(device: torch.device) -> torch.dtype:
    """Return bfloat16, or float32 for a processor that has no instructions for it."""
    slow = slow_dtypes({torch.bfloat16}, device)
    return torch.float32 if slow else torch.bfloat16


# --- the tests -----------------------------------------------------------------------------------


def tests(device: torch.device, sizes: Sizes) -> Iterator[Case]:
    """Run the tests for accelerators, and return what pytest says in the end."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *sizes.tests]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    print(run.stdout[-4000:], run.stderr[-4000:], flush=True)
    lines = run.stdout.strip().splitlines()
    not_passed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    yield {"said": lines[-1].strip("= ") if lines else "nothing", "not_passed": not_passed}
    if run.returncode:
        raise RuntimeError(f"pytest ended with the code {run.returncode}")


# --- layers and a model --------------------------------------------------------------------------


def race_of(device: torch.device, sizes: Sizes, **settings: Any) -> Race:
    """Return how the candidates run."""
    # On a processor, only whether the code can be traced is tried: kernels take minutes to build.
    backend = "eager" if device.type == "cpu" else "inductor"
    settings = {"backend": backend, "warm_seconds": sizes.warm_seconds, **settings}
    return Race(TIMED, sizes.budget, compiled=True, **settings)


def step(device: torch.device, sizes: Sizes) -> Iterator[Case]:
    """Measure forward and backward of one layer, the gradient of the input included."""
    dtype = dtype_of(device)
    race = race_of(device, sizes)
    budget = sizes.budget._replace(most_rounds=40)
    for layer in sizes.layers:
        for tokens in sizes.tokens:
            size = Size(layer.in_features, tokens, dtype, layer.out_features, sizes.r)
            case = layer_case(size, "step", race, device, memory=True)
            case["rates"] = measured_rates([layer], tokens, sizes.r, dtype, device, budget)
            yield case


def decoding(device: torch.device, sizes: Sizes) -> Iterator[Case]:
    """Measure forwards of few tokens through several layers that read the same input."""
    dtype = dtype_of(device)
    # On CUDA, this mode records a graph: the launches of its kernels cost nothing then.
    mode = "reduce-overhead" if device.type == "cuda" else None
    race = race_of(device, sizes, mode=mode, times=sizes.times)
    for layer in sizes.layers:
        for tokens in sizes.few_tokens:
            size = Size(layer.in_features, tokens, dtype, layer.out_features, sizes.r)
            yield layer_case(size, "forward", race, device, copies=sizes.copies)


def model(device: torch.device, sizes: Sizes) -> Iterator[Case]:
    """Measure loss, forward and backward of a language model, down to the embedding's output."""
    from transformers import AutoModelForCausalLM

    run = ModelRun(dtype_of(device), *sizes.model, sizes.r)
    with tempfile.TemporaryDirectory() as name:
        folder = write_model(Path(name) / "model", sizes is TINY)
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=run.dtype).to(device)
    base.model.layers = base.model.layers[: run.layers]
    case = model_case(base, run, race_of(device, sizes), device, memory=True)
    yield {**run.described(), "model": model_title(sizes), **case}


def finetune(device: torch.device, sizes: Sizes) -> Iterator[Case]:
    """Fine-tune the model by the command, and return what its report says."""
    from disha.finetune import main as command

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = ["--base", str(write_model(folder / "model", sizes is TINY))]
        words += ["--data", str(write_rows(folder / "rows.jsonl", sizes.rows))]
        words += ["--eval_split", "train[:64]", "--output_dir", str(folder / "output")]
        words += ["--r", str(sizes.r), "--max_steps", str(sizes.steps)]
        words += ["--samples", "0", "--disable_tqdm", "true"]
        if device.type == "cpu":
            words += ["--use_cpu", "true"]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        code = command(words)
        if code:
            raise RuntimeError(f"disha finetune ended with the code {code}; its output says why")
        peak = None
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
        report = json.loads((folder / "output" / "report.json").read_text(encoding="utf-8"))
    yield {
        "model": model_title(sizes),
        **{name: report[name] for name in REPORTED},
        "settings": {name: report["settings"][name] for name in SETTINGS},
        "peak_bytes": peak,
    }


def model_title(sizes: Sizes) -> str:
    """Return how the page calls the model."""
    return "a tiny Llama" if sizes is TINY else "SmolLM2-135M"


def write_rows(file: Path, count: int | None) -> Path:
    """Write the first rows of the demo, or all; return the file."""
    from docs.demo import docstring_pairs

    lines = [json.dumps(pair._asdict()) + "\n" for pair in docstring_pairs()[:count]]
    file.write_text("".join(lines), encoding="utf-8")
    return file


TABLES: Mapping[str, Callable[[torch.device, Sizes], Iterator[Case]]] = {
    "tests": tests,
    "step": step,
    "decoding": decoding,
    "model": model,
    "finetune": finetune,
}


if __name__ == "__main__":
    sys.exit(main())
