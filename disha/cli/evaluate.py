"""Measure a model on rows: loss, perplexity, and answers that are exactly right.

Several files are measured one by one, and together. --forgetting measures the loss on text that
the base itself has written too, and by how much the adapter raises it.

Examples:
  disha evaluate --adapter output/adapter.safetensors --data held_out.jsonl --compare
  disha evaluate --adapter output/adapter.safetensors --data held_out.jsonl --scale 0.25 0.5 0.75
  disha evaluate --base model.gguf --data test.jsonl other.jsonl --exact_match
"""

from __future__ import annotations

import math
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm import tqdm

from disha.cli.dispatcher import Parser
from disha.cli.models import (
    PromptRunner,
    add_answer_flags,
    add_model_flags,
    load_runner,
)
from disha.cli.output import show
from disha.errors import ArgumentError
from disha.files import file_at, save
from disha.finetune.data import load_rows
from disha.finetune.forgetting import CURVE, OWN_TEXT, Point, Scales, advise, own_text, plot
from disha.finetune.forms import form_rows, learns_marked_answers
from disha.text import counted, table


@dataclass(frozen=True)
class Measured:
    """Sums over rows, which can be added."""

    loss: float
    tokens: int
    exact: int | None = None

    def __add__(self, other: Measured) -> Measured:
        exact = None
        if self.exact is not None and other.exact is not None:
            exact = self.exact + other.exact
        return Measured(self.loss + other.loss, self.tokens + other.tokens, exact)

    def fields(self) -> dict[str, float]:
        """Return the mean loss of a token to predict (nats), its exponential, and the counts."""
        loss = self.loss / max(self.tokens, 1)
        fields = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700)),
            "tokens": self.tokens,
        }
        if self.exact is not None:
            fields["exact"] = self.exact
        return fields


def main(words: Sequence[str]) -> None:
    """Measure a model."""
    parser = Parser("evaluate", __doc__)
    add_model_flags(parser)
    add_answer_flags(parser)
    parser.add_argument(
        "--data",
        "--data_path",
        nargs="+",
        action="extend",
        required=True,
        help="as for disha finetune",
    )
    parser.add_argument("--dataset_split", default="train", help="such as train[:1000]")
    parser.add_argument("--dataset_field", nargs="+", default=[], help="question and answer")
    parser.add_argument(
        "--max_length", "--max_seq_length", type=int, default=512, help="tokens of a row"
    )
    parser.add_argument("--per_device_eval_batch_size", type=int, default=8, help="rows of a batch")
    parser.add_argument("--exact_match", action="store_true", help="generate answers, and compare")
    parser.add_argument("--compare", action="store_true", help="measure the base without it too")
    parser.add_argument(
        "--forgetting", action="store_true", help="measure the loss on text of the base too"
    )
    parser.add_argument(
        "--scale",
        nargs="+",
        type=float,
        default=[],
        help="measure loss and forgetting at these scales too (1: as trained), and plot them",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    flags = parser.parse(words)
    flags.forgetting = flags.forgetting or bool(flags.scale)
    if flags.forgetting and flags.adapter is None:
        raise ArgumentError("only an adapter forgets; name it with --adapter")
    read = {name: load_rows(name, flags.dataset_split) for name in flags.data}
    runner = load_runner(flags)
    sets = {
        name: form_rows(rows, flags.dataset_field, runner.tokenizer) for name, rows in read.items()
    }
    for name, rows in sets.items():
        if flags.exact_match and "completion" not in rows.column_names:
            raise ArgumentError(
                f"--exact_match needs rows with a question and an answer, and {name} has none"
            )
    trainers = {name: _make_trainer(runner, rows, flags) for name, rows in sets.items()}
    results: dict[str, dict[str, Measured]] = {}
    points: list[Point] = []
    if flags.adapter is None or flags.compare:
        results["base"] = _measure_sets(runner, trainers, flags)
    if flags.adapter is not None:
        adapted, points = _measure_adapter(runner, trainers, flags)
        results |= adapted
    counts = {name: len(trainer.train_dataset) for name, trainer in trainers.items()}
    _show(results, points, counts, flags)


def _measure_adapter(
    runner: PromptRunner, trainers: Mapping[str, Any], flags: Namespace
) -> tuple[dict[str, dict[str, Measured]], list[Point]]:
    """Measure the adapter as trained and at each scale; forgetting only if the flags ask for it."""
    own = None
    if flags.forgetting:
        own = own_text(runner.model, runner.tokenizer, _folder_of(flags) / OWN_TEXT)
    runner.load_adapter(flags)
    scales = Scales(runner.model)
    results: dict[str, dict[str, Measured]] = {}
    points: list[Point] = []
    for scale in dict.fromkeys([1.0, *flags.scale]):
        scales.set(scale)
        measured = results[_label_of(scale)] = _measure_sets(runner, trainers, flags)
        if own is not None:
            loss = sum_of(measured.values()).fields()["loss"]
            points.append(Point(scale, own.forgotten(runner.model), loss))
    return results, points


def _label_of(scale: float) -> str:
    return "adapter" if scale == 1 else f"scale {scale:g}"


def _folder_of(flags: Namespace) -> Path:
    return file_at(flags.adapter).parent


def _show(
    results: Mapping[str, Mapping[str, Measured]],
    points: Sequence[Point],
    counts: Mapping[str, int],
    flags: Namespace,
) -> None:
    """Print what was measured: of all rows, and of each data set if there are several."""
    wholes = {model: sum_of(measured.values()) for model, measured in results.items()}
    lines = {model: whole.fields() for model, whole in wholes.items()}
    for point in points:
        lines[_label_of(point.scale)]["forgetting"] = point.forgetting
    count = sum(counts.values())
    fields: dict[str, Any] = {**lines, "rows": count}
    if len(counts) > 1:
        fields["data"] = {name: {"rows": of_set} for name, of_set in counts.items()}
        for model, measured in results.items():
            for name, of_set in measured.items():
                lines[f"{model}, {name}"] = of_set.fields()
                fields["data"][name][model] = of_set.fields()
    header = max(lines.values(), key=len)
    cells = []
    for label, values in lines.items():
        texts = {name: f"{value:.5g}" for name, value in values.items()}
        cells.append((label, *(texts.get(name, "") for name in header)))
    said = [table(("", *header), cells), counted(count, "row")]
    if len(points) > 1:
        path = _folder_of(flags) / CURVE
        save(path, plot(points).savefig)
        said += [advise(points), f"the curve is in {path}"]
    show(flags.json, "\n".join(said), fields)


def sum_of(measured: Any) -> Measured:
    """Return the sums over all rows of several data sets."""
    first, *others = measured
    for other in others:
        first += other
    return first


def _measure_sets(
    runner: PromptRunner, trainers: Mapping[str, Any], flags: Namespace
) -> dict[str, Measured]:
    return {name: _measure(runner, trainer, flags) for name, trainer in trainers.items()}


def _measure(runner: PromptRunner, trainer: Any, flags: Namespace) -> Measured:
    """Measure the rows that have something to predict in the tokens that are left of them."""
    total = 0.0
    tokens = 0
    rows = trainer.train_dataset
    with torch.no_grad():
        for batch in tqdm(trainer.get_eval_dataloader(rows), desc="Measuring"):
            count = int((batch["labels"][:, 1:] != -100).sum())
            if count:  # a row of one token has nothing to predict
                total += float(runner.model(**batch).loss) * count
            tokens += count
    exact = _count_exact(runner, rows, flags) if flags.exact_match else None
    return Measured(total, tokens, exact)


def _make_trainer(runner: PromptRunner, rows: Dataset, flags: Namespace) -> Any:
    """Return a trainer that makes batches of the rows, with the labels that `trl` trains on."""
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
        trainer = Trainer(runner.model, settings, None, rows, processing_class=runner.tokenizer)
    runner.model.train(False)
    return trainer


def _count_exact(runner: PromptRunner, rows: Dataset, flags: Namespace) -> int:
    """Return how many last answers equal the row's, apart from white space around them."""
    exact = 0
    for batch in rows.iter(flags.per_device_eval_batch_size):
        tools = batch.get("tools", [None] * len(batch["prompt"]))
        texts = []
        expected = []
        for prompt, completion, of_row in zip(
            batch["prompt"], batch["completion"], tools, strict=True
        ):
            if isinstance(completion, str):
                texts.append(runner.render(prompt))
                expected.append(completion)
            else:  # a completion may have several turns
                texts.append(runner.render([*prompt, *completion[:-1]], of_row))
                expected.append(completion[-1]["content"])
        answers = runner.answer(texts, max_new_tokens=flags.max_new_tokens, do_sample=False)
        for answer, text in zip(answers, expected, strict=True):
            exact += answer == text.strip()
    return exact
