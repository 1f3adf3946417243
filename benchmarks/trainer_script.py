"""What a user would write to train an adapter of PEFT with the Trainer of `transformers`.

`python -m benchmarks.trainer_script FOLDER` reads `FOLDER/plan.json`. It writes a line of
`metrics.jsonl` for each step, and `times.json` at the end. `benchmarks.side_by_side` compares it
with `disha finetune`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, MissConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

__all__ = ["main"]

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IGNORED = -100


class Metrics(TrainerCallback):  # type: ignore[misc]
    """Writes the time and the tokens of each step."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = 0.0
        self.tokens: list[int] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._before = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Write a line."""
        now = time.perf_counter()
        seconds, self._before = now - self._before, now
        tokens = self.tokens[state.global_step - 1]
        line = {"step": state.global_step, "tokens": tokens, "tokens_per_second": tokens / seconds}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def main(folder: Path) -> None:
    """Train on `rows.jsonl` as `plan.json` says."""
    plan = json.loads((folder / "plan.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(plan["model"])
    model = AutoModelForCausalLM.from_pretrained(plan["model"], dtype=getattr(torch, plan["dtype"]))
    kind = {"miss": MissConfig, "lora": LoraConfig}[plan["method"]]
    scale = {"lora_alpha": plan["r"]} if plan["method"] == "lora" else {}
    model = get_peft_model(
        model, kind(r=plan["r"], target_modules=TARGETS, task_type="CAUSAL_LM", **scale)
    )

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        prompt = tokenizer(row["query"] + "\n", add_special_tokens=False).input_ids
        answer = tokenizer(row["response"], add_special_tokens=False).input_ids
        answer.append(tokenizer.eos_token_id)
        return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}

    rows, held_out = (
        [encode(json.loads(line)) for line in Path(plan[name]).read_text().splitlines()]
        for name in ("rows", "held_out")
    )
    metrics = Metrics(folder / "metrics.jsonl")

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        metrics.tokens.append(sum(len(row["input_ids"]) - 1 for row in batch))
        longest = max(len(row["input_ids"]) for row in batch)
        fill = {"input_ids": tokenizer.eos_token_id, "labels": IGNORED, "attention_mask": 0}
        padded: dict[str, list[list[int]]] = {name: [] for name in fill}
        for row in batch:
            row = {**row, "attention_mask": [1] * len(row["input_ids"])}
            for name, ids in row.items():
                padded[name].append(ids + [fill[name]] * (longest - len(ids)))
        return {name: torch.tensor(ids) for name, ids in padded.items()}

    arguments = TrainingArguments(
        output_dir=str(folder / "output"),
        per_device_train_batch_size=plan["batch"],
        num_train_epochs=1,
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        warmup_steps=1,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = Trainer(model, arguments, collate, rows, held_out, callbacks=[metrics])
    trainer.train()
    started = time.perf_counter()
    trainer.evaluate()
    evaluated = time.perf_counter()
    model.save_pretrained(folder / "adapter")
    times = {"evaluation": evaluated - started, "saving": time.perf_counter() - evaluated}
    (folder / "times.json").write_text(json.dumps(times))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
