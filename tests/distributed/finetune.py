"""`disha finetune` on two ranks. `tests/finetune/test_train.py` compares it with one process."""

from __future__ import annotations

import shlex

import datasets
import torch.distributed as dist

from disha.finetune import main
from tests.finetune.tiny_models import write_model, write_rows

FLAGS = shlex.split(
    """--r 8 --max_steps 8 --num_train_epochs 2 --save_steps 2 --logging_steps 1
--gradient_accumulation_steps 2 --learning_rate 0.01 --samples 0 --disable_tqdm True"""
)


def words(folder, output):
    """The flags of a run with the model and the rows of a folder."""
    given = {"base": folder / "model", "data": folder / "rows.jsonl", "output_dir": folder / output}
    return [*FLAGS, *(str(word) for name, path in given.items() for word in (f"--{name}", path))]


def check_a_run(folder):
    datasets.config.HF_DATASETS_CACHE = folder / f"cache{dist.get_rank()}"
    if dist.get_rank() == 0:
        write_model(folder / "model")
        write_rows(folder / "rows.jsonl")
    dist.barrier()
    assert main([*words(folder, "two"), "--per_device_train_batch_size", "2"]) == 0
