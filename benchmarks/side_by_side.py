"""The adapter beside those of PEFT in one and the same trainer, and the whole job beside `Trainer`.

    python -m benchmarks.side_by_side            # SmolLM2-135M, about 20 minutes on two idle cores
    python -m benchmarks.side_by_side --tiny     # a tiny model, to try the script

All contestants train the same model on the same rows. In each round, each of them trains one step,
in a new random order. Reported are the seconds of a step, from batch to optimizer, and the most
that the allocator gives out in one forward and backward pass of the longest batch, which is a
count.

- **adapter**: `SFTTrainer` with MiSS, PEFT's MiSS, and PEFT's LoRA of equal parameters; the same
  rows in the same order.
- **job**: from `Trainer` with PEFT to what `disha finetune` does, one part after the other: the
  adapter, the loss on learned positions only (`trl`'s, which the trainer of the command asks for),
  256 rows, those of similar length in a batch (`transformers`'). The last two help any adapter.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.memory import allocated_peak
from benchmarks.protocol import Budget, R, Run, compare, slow_dtypes
from benchmarks.results import describe, dtype_text, write_results
from benchmarks.whole_model import projections, write_model

CPU = torch.device("cpu")


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

Rows = list[dict[str, list[int]]]


def side_by_side(tiny: bool, folder: Path) -> dict[str, Any]:
    """Measure both tables, and return the results."""
    sizes, job_sizes = (TINY, TINY) if tiny else (SIZES, JOB_SIZES)
    write_model(folder, tiny)
    rows = _rows(job_sizes, folder)
    results = describe(CPU)
    dtypes = [torch.float32, torch.bfloat16]
    slow = slow_dtypes({torch.bfloat16}, CPU)
    results["tables"] = {
        "adapter": [_race(ADAPTER, one, sizes, rows, folder) for one in dtypes if one not in slow],
        "job": [_race(JOB, torch.float32, job_sizes, rows, folder)],
    }
    return results


def _rows(sizes: Sizes, folder: Path) -> Rows:
    """Return as many rows of the demo as are trained, as tokens. None is so long as to be cut."""
    from transformers import AutoTokenizer

    from docs.demo import docstring_pairs

    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs = list(docstring_pairs())
    random.Random(0).shuffle(pairs)
    rows: Rows = []
    for pair in pairs:
        prompt = tokenizer(f"{pair.query}\n")["input_ids"]
        answer = [*tokenizer(pair.response)["input_ids"], tokenizer.eos_token_id]
        if len(prompt) + len(answer) <= sizes.length and len(rows) < sizes.steps * sizes.batch:
            labels = [-100] * len(prompt) + answer
            rows.append({"input_ids": prompt + answer, "labels": labels})
    return rows


def _race(
    names: Sequence[str], dtype: torch.dtype, sizes: Sizes, rows: Rows, folder: Path
) -> dict[str, Any]:
    """Let contestants train one step each in turn, in random order, to the end of the rows."""
    rows = rows[: sizes.steps * sizes.batch]
    trainers = {name: _trainer(CONTESTANTS[name], dtype, sizes, rows, folder) for name in names}
    steps = {name: _step(trainer) for name, trainer in trainers.items()}
    seconds = compare(steps, Budget(0.0, sizes.steps, sizes.steps, warm_up=0))
    contestants = {
        name: {
            "title": CONTESTANTS[name].title,
            "seconds": seconds[name],
            "pass_bytes": _pass_bytes(trainer),
        }
        for name, trainer in trainers.items()
    }
    return {"dtype": dtype_text(dtype), **sizes._asdict(), "contestants": contestants}


def _step(trainer: Any) -> Run:
    """Return a training step of a trainer on its next batch, after one that makes it ready."""
    trainer.train()
    batches = iter(trainer.get_train_dataloader())

    def step() -> None:
        trainer.training_step(trainer.model, next(batches))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return step


def _pass_bytes(trainer: Any) -> int:
    """Return the most that the allocator gives out in a forward and backward pass."""
    batch = max(trainer.get_train_dataloader(), key=lambda one: one["input_ids"].shape[1])
    return allocated_peak(lambda: trainer.training_step(trainer.model, batch), CPU)


def _trainer(
    contestant: Contestant, dtype: torch.dtype, sizes: Sizes, rows: Rows, folder: Path
) -> Any:
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

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = _adapted(model, contestant.adapter, sizes.r)
    settings: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "max_steps": 1,
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
    dataset = Dataset.from_list(rows)
    if contestant.trainer == "transformers":
        collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
        return Trainer(model, TrainingArguments(**settings), collator, dataset)
    made = {"trl": SFTTrainer, "command": CommandTrainer}[contestant.trainer]
    arguments = SFTConfig(max_length=sizes.length, **settings)
    return made(model, arguments, train_dataset=dataset, processing_class=tokenizer)


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.side_by_side", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few steps")
    parser.add_argument("--out", type=Path, default=Path("bench-output/side-by-side.json"))
    flags = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        results = side_by_side(flags.tiny, Path(name) / "model")
    write_results(flags.out, results)
    print(flags.out)


if __name__ == "__main__":
    sys.exit(main())
