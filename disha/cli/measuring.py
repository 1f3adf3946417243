"""What `disha evaluate` measures: the loss of rows, exact answers, and forgetting over scales."""

from __future__ import annotations

import math
import operator
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from tqdm import tqdm

from disha.cli.models import PromptRunner, load_runner
from disha.errors import ArgumentError
from disha.files import file_at, save
from disha.finetune.data import load_rows
from disha.finetune.forgetting import (
    CURVE,
    OWN_TEXT,
    OwnText,
    Point,
    Scales,
    advise,
    own_text,
    plot,
)
from disha.finetune.forms import form_rows, learns_marked_answers
from disha.text import table

Lines = dict[str, dict[str, float]]
"""Label of a line of the table -> its values by their names."""

Measure = Callable[[str], Lines]
"""Label -> what the rows give with the model as it is now, under that label."""


def measure_model(flags: Namespace) -> tuple[str, Lines]:
    """Return what the flags ask for: as a table with remarks, and as its lines."""
    read = {name: load_rows(name, flags.dataset_split) for name in flags.data}
    runner = load_runner(flags)
    trainers = {name: _make_trainer(runner, name, rows, flags) for name, rows in read.items()}
    measure = partial(_measure_all, runner, trainers, flags)
    lines: Lines = {}
    if flags.adapter is None or flags.compare:
        lines |= measure("base")
    said = []
    if flags.adapter is not None:
        folder = file_at(flags.adapter).parent
        own = None
        if flags.forgetting:
            own = own_text(runner.model, runner.tokenizer, folder / OWN_TEXT)
        runner.load_adapter(flags)
        of_adapter, points = _measure_at_scales(runner, flags.scale, measure, own)
        lines |= of_adapter
        if len(points) > 1:
            save(folder / CURVE, plot(points).savefig)
            said = [advise(points), f"the curve is in {folder / CURVE}"]
    return "\n".join([_as_table(lines), *said]), lines


def _measure_at_scales(
    runner: PromptRunner, others: Sequence[float], measure: Measure, own: OwnText | None
) -> tuple[Lines, list[Point]]:
    """Return what the adapter gives as trained and at other scales, and the points of the curve."""
    scales = Scales(runner.model)
    lines: Lines = {}
    points = []
    for scale in dict.fromkeys([1.0, *others]):
        label = "adapter" if scale == 1 else f"scale {scale:g}"
        scales.set(scale)
        lines |= measure(label)
        if own is not None:
            forgetting = lines[label]["forgetting"] = own.forgotten(runner.model)
            points.append(Point(scale, forgetting, lines[label]["loss"]))
    return lines, points


def _as_table(lines: Lines) -> str:
    header = max(lines.values(), key=len)
    rows = []
    for label, values in lines.items():
        texts = {name: f"{value:.5g}" for name, value in values.items()}
        rows.append((label, *(texts.get(name, "") for name in header)))
    return table(("", *header), rows)


def _measure_all(
    runner: PromptRunner, trainers: Mapping[str, Any], flags: Namespace, label: str
) -> Lines:
    """Return what all rows give, under a label, and what each data set gives if there are more."""
    sums = {name: _measure(runner, trainer, flags) for name, trainer in trainers.items()}
    lines = {label: _average(list(sums.values()))}
    if len(sums) > 1:
        lines |= {f"{label}, {name}": _average([of_set]) for name, of_set in sums.items()}
    return lines


def _average(sums: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean loss of a token to predict (nats), its exponential, and the counts."""
    added: dict[str, float] = dict.fromkeys(sums[0], 0)
    for of_set in sums:
        for name, value in of_set.items():
            added[name] += value
    loss = added.pop("loss") / max(added["tokens"], 1)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), **added}


def _measure(runner: PromptRunner, trainer: Any, flags: Namespace) -> dict[str, float]:
    """Return sums over the rows that have something to predict in the tokens that are left."""
    total = 0.0
    tokens = 0
    rows = trainer.train_dataset
    with torch.no_grad():
        for batch in tqdm(trainer.get_eval_dataloader(rows), desc="Measuring"):
            count = int((batch["labels"][:, 1:] != -100).sum())
            if count:  # a row of one token has nothing to predict
                total += float(runner.model(**batch).loss) * count
            tokens += count
    sums = {"loss": total, "tokens": tokens, "rows": len(rows)}
    if flags.exact_match:
        sums["exact"] = _count_exact(runner, rows, flags)
    return sums


def _make_trainer(runner: PromptRunner, name: str, read: Dataset, flags: Namespace) -> Any:
    """Return a trainer that makes batches of rows, with the labels that `trl` trains on."""
    rows = form_rows(read, flags.dataset_field, runner.tokenizer)
    if flags.exact_match and "completion" not in rows.column_names:
        raise ArgumentError(
            f"--exact_match needs rows with a question and an answer, and {name} has none"
        )
    # Help must not wait for trainers.
    from trl import SFTConfig

    from disha.finetune.trainer import Trainer
    from disha.integrations.transformers import QUANTIZED

    for flag in QUANTIZED:  # a trainer refuses a quantised model, and here it only makes batches
        setattr(runner.model, flag, False)

    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            folder,
            max_length=flags.max_length,
            per_device_eval_batch_size=flags.per_device_eval_batch_size,
            assistant_only_loss=learns_marked_answers(rows, runner.tokenizer),
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=runner.model.device.type == "cpu",
            report_to=[],
        )
        trainer = Trainer(
            runner.model, settings, train_dataset=rows, processing_class=runner.tokenizer
        )
    runner.model.train(False)
    return trainer


def _count_exact(runner: PromptRunner, rows: Dataset, flags: Namespace) -> int:
    """Return how many last answers equal the row's, apart from white space around them."""
    texts = []
    expected = []
    for row in rows:
        prompt = row["prompt"]
        completion = row["completion"]
        if not isinstance(completion, str):  # it may have several turns
            prompt = [*prompt, *completion[:-1]]
            completion = completion[-1]["content"]
        texts.append(runner.render(prompt, row.get("tools")))
        # trl has added the end of answers, which an answer is decoded without
        expected.append(completion.removesuffix(runner.tokenizer.eos_token or "").strip())
    answers = []
    size = flags.per_device_eval_batch_size
    for start in range(0, len(texts), size):
        batch = texts[start : start + size]
        answers += runner.answer(batch, max_new_tokens=flags.max_new_tokens, do_sample=False)
    return sum(map(operator.eq, answers, expected))
