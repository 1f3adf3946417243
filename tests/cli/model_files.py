"""A tiny model that repeats a word once, and rows that ask it to repeat it twice.

So an adapter trained on them shows: its answers are others, and right.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from pathlib import Path

from disha.cli import main

__all__ = ["ADAPTER_FLAGS", "write_files", "write_guide_files", "write_rows"]

WORDS = ("hello", "world", "well", "yellow", "hollow")

ADAPTER_FLAGS = (
    *("--bone_r", "16", "--max_seq_length", "96", "--num_train_epochs", "30"),
    *("--learning_rate", "1e-2", "--per_device_train_batch_size", "16"),
)
"""What the tiny model learns the rows with, in a second."""


def write_files(folder: Path) -> None:
    """Write the folder `model`, and `train.jsonl` and `held_out.jsonl` with MetaMathQA's fields."""
    from tests.finetune.tiny_checkpoints import write_folder  # transformers takes seconds to import

    rows = [
        {"query": f"say {word} {number}", "response": f"{word} {word}"}
        for word in WORDS
        for number in range(10)
    ]
    with tempfile.TemporaryDirectory() as made:
        untrained = write_folder(Path(made) / "untrained", "llama3")
        once = [{**row, "response": row["response"].split()[0]} for row in rows]
        data = write_rows(Path(made) / "once.jsonl", once)
        with contextlib.redirect_stdout(io.StringIO()):
            done = main(
                [
                    *("finetune", "--base_model_name_or_path", str(untrained), "--merge"),
                    *("--data_path", str(data), "--output_dir", made, *ADAPTER_FLAGS),
                ]
            )
        assert done == 0
        (Path(made) / "merged").rename(folder / "model")
    write_rows(folder / "train.jsonl", [row for i, row in enumerate(rows) if i % 5])
    write_rows(folder / "held_out.jsonl", rows[::5])


def write_guide_files(folder: Path) -> None:
    """Write what the guide's commands read: models of every kind, and rows for them."""
    import torch
    from safetensors.torch import save_file
    from torch import nn
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.finetune import tiny_checkpoints, tiny_gguf

    write_files(folder)
    tiny_checkpoints.write_gguf(folder / "model.gguf", "llama3")
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
    tokens = {"vocab_size": len(tiny_gguf.TOKENS), "bos_token_id": 1, "eos_token_id": 2}
    GPT2LMHeadModel(GPT2Config(**sizes, **tokens)).save_pretrained(folder / "gpt2")
    tiny_checkpoints.write_tokenizer(folder / "gpt2")
    extra = [{"asked": f"say {word} again", "answered": f"{word} {word}"} for word in WORDS]
    write_rows(folder / "extra.jsonl", extra)
    classifier = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    save_file(classifier.state_dict(), folder / "classifier.safetensors")
    numbers = [
        {"pixels": torch.rand(64).tolist(), "label": label} for label in range(10) for _ in range(3)
    ]
    write_rows(folder / "digits.jsonl", numbers)


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
