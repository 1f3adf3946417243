"""Measure a model on rows: loss, perplexity, and answers that are exactly right.

Examples:
  disha evaluate --adapter output/adapter.safetensors --data held_out.jsonl --compare
  disha evaluate --base model.gguf --data test.jsonl --exact_match
"""

from __future__ import annotations

import math
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from tqdm import tqdm

from disha.cli.dispatcher import Parser
from disha.cli.models import Asker, add_model_flags, opened
from disha.cli.output import show
from disha.errors import ArgumentError
from disha.finetune.data import load_rows
from disha.finetune.forms import form_rows, learns_marked_answers
from disha.text import table


def main(words: Sequence[str]) -> None:
    """Measure a model."""
    parser = Parser("evaluate", __doc__)
    add_model_flags(parser)
    parser.add_argument("--data", "--data_path", required=True, help="as for disha finetune")
    parser.add_argument("--dataset_split", default="train", help="such as train[:1000]")
    parser.add_argument("--dataset_field", nargs="+", default=[], help="question and answer")
    parser.add_argument("--max_length", "--max_seq_length", type=int, default=512, help="of a row")
    parser.add_argument("--per_device_eval_batch_size", type=int, default=8, help="rows of a batch")
    parser.add_argument("--exact_match", action="store_true", help="generate answers, and compare")
    parser.add_argument("--compare", action="store_true", help="measure the base without it too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    flags = parser.parsed(words)
    read = load_rows(flags.data, flags.dataset_split)
    asker = opened(flags)
    rows = form_rows(read, flags.dataset_field, asker.tokenizer)
    if flags.exact_match and "completion" not in rows.column_names:
        raise ArgumentError("--exact_match needs rows with a question and an answer")
    batches = _batches(asker, rows, flags)
    measured = {}
    if flags.adapter is None or flags.compare:
        measured["base"] = _measured(asker, batches, rows, flags)
    if flags.adapter is not None:
        asker.load(flags)
        measured["adapter"] = _measured(asker, batches, rows, flags)
    names = next(iter(measured.values()))
    cells = [
        (name, *(f"{value:.5g}" for value in values.values())) for name, values in measured.items()
    ]
    text = f"{table(('', *names), cells)}\n{len(rows):,} rows"
    show(flags.json, text, {**measured, "rows": len(rows)})


def _measured(asker: Asker, batches: Any, rows: Dataset, flags: Namespace) -> dict[str, float]:
    """Return the mean loss of a token to predict (nats), its exponential, and more if asked."""
    total = 0.0
    tokens = 0
    with torch.no_grad():
        for batch in tqdm(batches, desc="Measuring"):
            count = int((batch["labels"][:, 1:] != -100).sum())
            if count:  # a row of one token has nothing to predict
                total += float(asker.model(**batch).loss) * count
            tokens += count
    loss = total / max(tokens, 1)
    found = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": tokens}
    if flags.exact_match:
        found["exact"] = _exact(asker, rows, flags)
    return found


def _batches(asker: Asker, rows: Dataset, flags: Namespace) -> Any:
    """Return the rows as batches, with the labels that `trl` trains on."""
    # Help must not wait for trainers.
    from trl import SFTConfig

    from disha.finetune.trainer import Trainer
    from disha.integrations.transformers import QUANTIZED

    for flag in QUANTIZED:  # a trainer refuses a quantised model, and here it only makes batches
        setattr(asker.model, flag, False)

    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            folder,
            max_length=flags.max_length,
            per_device_eval_batch_size=flags.per_device_eval_batch_size,
            assistant_only_loss=learns_marked_answers(rows, asker.tokenizer),
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=asker.model.device.type == "cpu",
            report_to=[],
        )
        trainer = Trainer(asker.model, settings, None, rows, processing_class=asker.tokenizer)
    asker.model.train(False)
    return trainer.get_eval_dataloader(trainer.train_dataset)


def _exact(asker: Asker, rows: Dataset, flags: Namespace) -> int:
    """Return how many answers equal the row's, apart from white space around them."""
    exact = 0
    for batch in rows.iter(flags.per_device_eval_batch_size):
        answers = asker.answers(
            batch["prompt"], max_new_tokens=flags.max_new_tokens, do_sample=False
        )
        for answer, given in zip(answers, batch["completion"], strict=True):
            text = given if isinstance(given, str) else given[-1]["content"]
            exact += answer == text.strip()
    return exact
