"""`disha finetune` on two ranks. `test_transformers_parallel.py` compares it with one process."""

import json
import shlex
from functools import partial
from unittest.mock import patch

import datasets
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from disha.files import ADAPTER_NAME
from disha.finetune import main
from disha.finetune.trainer import Trainer
from tests.distributed import trainers
from tests.distributed.deepspeed_zero import config
from tests.finetune.tiny_models import rows, write_model, write_rows

FLAGS = shlex.split(
    """--r 8 --max_steps 6 --num_train_epochs 2 --save_steps 2 --logging_steps 1
--gradient_accumulation_steps 2 --learning_rate 0.01 --samples 1 --disable_tqdm True
--max_grad_norm 0 --load_best_model_at_end --eval_strategy steps --eval_steps 2
--metric_for_best_model loss --greater_is_better True --save_total_limit 9
--new_tokens <think>"""
)
ENGINES = {
    "ddp": ("", "optimizer.pt"),
    "fsdp2": ("--fsdp full_shard", "pytorch_model_fsdp.bin"),
    "zero2": ("--deepspeed zero2.json", "global_step6"),
    "zero3": ("--deepspeed zero3.json", "global_step6"),
}
"""An engine -> the flags that ask for it, and what it leaves in a checkpoint."""


def words(folder, output, *more):
    """The flags of a run with the model and the rows of a folder."""
    given = {"base": folder / "model", "data": folder / "rows.jsonl", "output_dir": folder / output}
    words = (str(word) for name, path in given.items() for word in (f"--{name}", path))
    return [*FLAGS, *words, *more]


def ran(engine, folder, output, *more):
    """Run the command, and return its report."""
    asked, left = ENGINES[engine]
    flags = [*shlex.split(asked), "--per_device_train_batch_size", "2", *more]
    flags = [str(folder / flag) if flag.endswith(".json") else flag for flag in flags]
    with trainers.accelerate_with(engine):
        assert main(words(folder, output, *flags)) == 0
    dist.barrier()
    assert (folder / output / "checkpoint-6" / left).exists()
    return json.loads((folder / output / "report.json").read_text())


def run(engine, folder):
    datasets.config.HF_DATASETS_CACHE = folder / f"cache{dist.get_rank()}"
    if dist.get_rank() == 0:
        write_model(folder / "model")
        write_rows(folder / "rows.jsonl", rows(24))
        for stage in (2, 3):
            settings = config(stage, gradient_accumulation_steps=2)
            (folder / f"zero{stage}.json").write_text(json.dumps(settings))
    dist.barrier()
    real = Trainer.evaluate
    with patch.object(Trainer, "evaluate", autospec=True, side_effect=real) as evaluate:
        report = ran(engine, folder, "two")
    proved = evaluate.call_args.args[0].model
    assert isinstance(next(proved.parameters()), DTensor) == (engine == "fsdp2")
    assert report["best_step"] == 2
    saved, best = (
        load_file(folder / "two" / place / ADAPTER_NAME) for place in ("", "checkpoint-2")
    )
    assert all(torch.equal(saved[key], best[key]) for key in saved.keys() | best.keys())
    base = (folder / "model" / "model.safetensors").stat().st_size
    files = [*(folder / "two" / "checkpoint-6").rglob("*")]
    assert max(file.stat().st_size for file in files) < base / 2
    assert "model.safetensors" not in {file.name for file in files}  # the adapter is there once
    assert report["proof"]["loaded"] == pytest.approx(report["proof"]["trained"], abs=1e-5)
    last = (folder / "two" / "checkpoint-6" / ADAPTER_NAME).read_bytes()
    for step in (2, 4):  # in the first epoch, and in the second
        start = folder / "two" / f"checkpoint-{step}"
        more = ("--resume_from_checkpoint", str(start), "--samples", "0")
        rest = ran(engine, folder, f"rest{step}", *more)
        assert list(rest["training_losses"].values()) == list(report["training_losses"].values())
        assert (folder / f"rest{step}" / "checkpoint-6" / ADAPTER_NAME).read_bytes() == last


for engine in filter(trainers.ENGINES.__contains__, ENGINES):
    vars()[f"check_{engine}"] = partial(run, engine)
