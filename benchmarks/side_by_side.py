"""The adapter beside those of PEFT in one and the same trainer, and the whole job beside `Trainer`.

    python -m benchmarks.side_by_side            # SmolLM2-135M, about 20 minutes on two idle cores
    python -m benchmarks.side_by_side --tiny     # a tiny model, to try the script

Every contestant is a process that trains the same model on the same rows. In each round, each of
them trains one step, in a new random order; the first round is not counted. Reported are seconds
and processor time of a step, the peak of a process's resident memory since training began, and the
most that the allocator gave out in one forward and backward pass, which is a count.

- **adapter**: `SFTTrainer` with MiSS, PEFT's MiSS, and PEFT's LoRA of equal parameters; the same
  rows in the same order.
- **job**: from `Trainer` with PEFT to what `disha finetune` does, one part after the other: the
  adapter, the loss on learned positions only (`trl`'s, which the trainer of the command asks for),
  256 rows, those of similar length in a batch (`transformers`'). The last two help any adapter.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.memory import allocated_peak, status_bytes
from benchmarks.protocol import R, slow_dtypes
from benchmarks.results import describe, write_results
from benchmarks.whole_model import projections, write_model


class Contestant(NamedTuple):
    """An adapter and its trainer: that of transformers, of trl, or of the command."""

    title: str
    adapter: str
    trainer: str
    grouped: bool = False


CONTESTANTS = {
    "sft_bone": Contestant("SFTTrainer, disha MiSS", "bone", "trl"),
    "sft_miss": Contestant("SFTTrainer, PEFT MiSS", "miss", "trl"),
    "sft_lora": Contestant("SFTTrainer, PEFT LoRA", "lora", "trl"),
    "trainer_bone": Contestant("Trainer, disha MiSS", "bone", "transformers"),
    "trainer_miss": Contestant("Trainer, PEFT MiSS", "miss", "transformers"),
    "trainer_lora": Contestant("Trainer, PEFT LoRA", "lora", "transformers"),
    "learned_bone": Contestant("disha finetune, rows in random order", "bone", "command"),
    "grouped_bone": Contestant("disha finetune", "bone", "command", grouped=True),
}
ADAPTER = ("sft_bone", "sft_miss", "sft_lora")
JOB = ("trainer_lora", "trainer_miss", "trainer_bone", "learned_bone", "grouped_bone")
PARTS = {
    "adapter": ("trainer_bone", "trainer_lora"),
    "loss on learned positions": ("learned_bone", "trainer_bone"),
    "rows by length": ("grouped_bone", "learned_bone"),
    "all": ("grouped_bone", "trainer_lora"),
    "all, against PEFT's MiSS": ("grouped_bone", "trainer_miss"),
}
"""A part of the gain -> the contestant with it, and the one without it."""


class Sizes(NamedTuple):
    """How much is trained."""

    steps: int
    batch: int
    length: int
    r: int


SIZES = Sizes(steps=16, batch=4, length=256, r=R)
JOB_SIZES = SIZES._replace(steps=64)
TINY = Sizes(steps=4, batch=2, length=64, r=4)


def side_by_side(tiny: bool, folder: Path) -> dict[str, Any]:
    """Measure both tables, and return the results."""
    sizes, job_sizes = (TINY, TINY) if tiny else (SIZES, JOB_SIZES)
    write_model(folder / "model", tiny)
    _write_rows(folder, job_sizes)
    device = torch.device("cpu")
    results = describe(device)
    slow = slow_dtypes({torch.bfloat16}, device)
    dtypes = ["float32"] if slow else ["float32", "bfloat16"]
    results["tables"] = {
        "adapter": [_race(ADAPTER, dtype, sizes, folder) for dtype in dtypes],
        "job": [_race(JOB, "float32", job_sizes, folder)],
    }
    return results


# --- the same model and rows for all -------------------------------------------------------------


def _write_rows(folder: Path, sizes: Sizes) -> None:
    """Write as many rows of the demo as are trained, as tokens. None is so long as to be cut."""
    from transformers import AutoTokenizer

    from docs.demo import docstring_pairs

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    pairs = list(docstring_pairs())
    random.Random(0).shuffle(pairs)
    rows: list[dict[str, list[int]]] = []
    for pair in pairs:
        prompt = tokenizer(f"{pair.query}\n")["input_ids"]
        answer = [*tokenizer(pair.response)["input_ids"], tokenizer.eos_token_id]
        if len(prompt) + len(answer) <= sizes.length and len(rows) < sizes.steps * sizes.batch:
            labels = [-100] * len(prompt) + answer
            rows.append({"input_ids": prompt + answer, "labels": labels})
    (folder / "rows.json").write_text(json.dumps(rows))


# --- the race ------------------------------------------------------------------------------------


def _race(names: Sequence[str], dtype: str, sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Let contestants train one step each in turn, in random order, to the end of the rows."""
    workers = {name: _started(name, dtype, sizes, folder) for name in names}
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    shuffled = random.Random(0)
    try:
        for process in workers.values():
            _line(process, folder)  # it is ready
        for _ in range(sizes.steps):
            for name in shuffled.sample(names, len(names)):
                steps[name].append(_asked(workers[name], folder))
        ends = {name: _asked(process, folder) for name, process in workers.items()}
    finally:
        for process in workers.values():
            process.kill()
            process.wait()
    return {
        "dtype": dtype,
        **sizes._asdict(),
        "contestants": {
            name: {
                "title": CONTESTANTS[name].title,
                "seconds": [one["seconds"] for one in steps[name][1:]],
                "processor_seconds": [one["processor_seconds"] for one in steps[name][1:]],
                **ends[name],
            }
            for name in names
        },
    }


def _started(name: str, dtype: str, sizes: Sizes, folder: Path) -> subprocess.Popen[str]:
    words = ["-m", "benchmarks.side_by_side", "--worker", name, dtype, json.dumps(sizes)]
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen(
            [sys.executable, *words, "--folder", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )


def _asked(process: subprocess.Popen[str], folder: Path) -> dict[str, Any]:
    """Let a process go on, and return what it says then."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return _line(process, folder)


def _line(process: subprocess.Popen[str], folder: Path) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a contestant has failed:\n{(folder / 'log.txt').read_text()[-4000:]}")
    found: dict[str, Any] = json.loads(line)
    return found


# --- one contestant ------------------------------------------------------------------------------


def _work(name: str, dtype: str, sizes: Sizes, folder: Path) -> None:
    """Train, one step for each line of standard input, and write what it took."""
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # trainers print, and only measurements may get into the pipe

    def say(**values: float) -> None:
        print(json.dumps(values), file=said, flush=True)

    trainer = _trainer(CONTESTANTS[name], dtype, sizes, folder)
    trainer.add_callback(_stepping(say))
    batch = max(trainer.get_train_dataloader(), key=lambda one: one["input_ids"].shape[1])
    _reset_peak()
    say()
    trainer.train()
    sys.stdin.readline()
    peak = status_bytes("VmHWM") or 0
    trainer.model.train()
    one_pass = allocated_peak(
        lambda: trainer.training_step(trainer.model, dict(batch)), trainer.args.device
    )
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    say(peak_bytes=peak, pass_bytes=one_pass, parameters=trained)


def _trainer(contestant: Contestant, dtype: str, sizes: Sizes, folder: Path) -> Any:
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )
    from trl import SFTConfig, SFTTrainer

    from disha.finetune.trainer import Trainer as CommandTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, dtype))
    model = _adapted(model, contestant.adapter, sizes.r)
    settings: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "num_train_epochs": 1,
        "per_device_train_batch_size": sizes.batch,
        "learning_rate": 1e-4,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "train_sampling_strategy": "group_by_length" if contestant.grouped else "random",
    }
    taken = json.loads((folder / "rows.json").read_text())[: sizes.steps * sizes.batch]
    rows = Dataset.from_list(taken)
    if contestant.trainer == "transformers":
        collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
        return Trainer(model, TrainingArguments(**settings), collator, rows)
    made = {"trl": SFTTrainer, "command": CommandTrainer}[contestant.trainer]
    arguments = SFTConfig(max_length=sizes.length, **settings)
    return made(model, arguments, train_dataset=rows, processing_class=tokenizer)


def _adapted(model: nn.Module, adapter: str, r: int) -> Any:
    """Return a model with an adapter on all projections of its layers."""
    import disha

    names = projections(model)
    if adapter == "bone":
        return disha.inject_adapters(model, [f"^{name}$" for name in names], r=r)
    from peft import LoraConfig, MissConfig, get_peft_model

    if adapter == "miss":
        return get_peft_model(model, MissConfig(r=r, target_modules=names))
    shapes = [tuple(model.get_parameter(f"{name}.weight").shape) for name in names]
    outputs, inputs = map(sum, zip(*shapes, strict=True))
    rank = max(1, round(r * outputs / (inputs + outputs)))
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=names))


def _stepping(say: Any) -> Any:
    """Return a callback that waits for a line before each step, and says what the step took."""
    from transformers import TrainerCallback

    class Stepping(TrainerCallback):
        def on_step_begin(self, *given: Any, **named: Any) -> None:
            sys.stdin.readline()
            self.began = time.perf_counter(), time.process_time()

        def on_step_end(self, *given: Any, **named: Any) -> None:
            seconds, processor = time.perf_counter(), time.process_time()
            say(seconds=seconds - self.began[0], processor_seconds=processor - self.began[1])

    return Stepping()


def _reset_peak() -> None:
    """Let the peak of the resident memory begin anew, where the system allows that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        print("the peak of memory counts from the start of the process", file=sys.stderr)


def main() -> None:
    """Measure, and write the results; or be a contestant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few steps")
    parser.add_argument("--out", type=Path, default=Path("bench-output/side-by-side.json"))
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker:
        name, dtype, sizes = flags.worker
        return _work(name, dtype, Sizes(*json.loads(sizes)), flags.folder)
    with tempfile.TemporaryDirectory() as name:
        results = side_by_side(flags.tiny, Path(name))
    write_results(flags.out, results)
    print(flags.out)
    return None


if __name__ == "__main__":
    main()
