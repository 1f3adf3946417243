"""What a run writes beside the adapter, and the proof that the saved file is the trained one."""

from __future__ import annotations

import copy
import importlib.metadata
import itertools
import json
import math
import platform
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import TrainerState
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import SFTConfig

import disha
from disha.errors import AdapterFileWarning, DishaError
from disha.files import save
from disha.finetune.base import Base, loading_device
from disha.finetune.forgetting import CURVE, OWN_TEXT, own_text
from disha.finetune.notes import read_notes
from disha.finetune.trainer import Trainer
from disha.integrations.transformers import AdapterCheckpoints
from disha.text import counted

MERGED = "merged"
PLOT, SAMPLES, REPORT = "loss.png", "samples.md", "report.json"
RESULTS = (PLOT, SAMPLES, REPORT, CURVE)
PACKAGES = ("torch", "transformers", "trl", "datasets", "accelerate", "safetensors", "einops")
SAMPLE_TOKENS = 64
TOLERANCE = 1e-3
"""How much the loss of the saved file may differ, in nats per token. It differs at all only where
a device does not always add up in the same order."""


@dataclass(frozen=True)
class Outcome:
    """What a training leaves, without its model."""

    checked: Dataset
    loss: float
    facts: dict[str, Any]
    """What the report says of the training."""


Sample = dict[str, str]
"""A question with its answers, and the answer in the data."""


@dataclass(frozen=True)
class Proof:
    """The loss of the trained model, and that of the base with the saved file."""

    trained: float
    loaded: float
    samples: list[Sample]
    forgetting: float | None
    """How much higher the loss is on text of the base; None where no answers were asked for."""

    def require_same(self, path: Path) -> None:
        """Raise if the losses differ."""
        if not abs(self.loaded - self.trained) <= TOLERANCE:
            raise DishaError(
                f"the saved adapter gives the loss {self.loaded:.6f}, and the trained model gave "
                f"{self.trained:.6f}; do not use the file, which stays as {path.name}"
            )


def prove(base: Base, path: Path, training: SFTConfig, outcome: Outcome) -> Proof:
    """Load the base again and the saved adapter into it, let both answer, and measure the loss."""
    training = copy.copy(training)
    training.report_to = []
    training.deepspeed_plugin = None  # accelerate keeps the first one
    training.dataset_kwargs = {"skip_prepare_dataset": True}  # packed rows can't be packed again
    is_partitioned = is_deepspeed_zero3_enabled()  # type: ignore[no-untyped-call]
    is_sharded = is_partitioned or training.fsdp
    device = loading_device(base, training)
    model, tokenizer = base.load(device, read_notes(path))
    # Sharded models would need all ranks for an answer.
    is_shown = training.process_index == 0 and not is_sharded
    count = training.samples if is_shown else 0
    pairs = list(_questions(outcome.checked, count))
    questions = [question for question, _ in pairs]
    without = _answers(model, tokenizer, questions)
    own = own_text(model, tokenizer, path.parent / OWN_TEXT) if count else None
    with warnings.catch_warnings():
        if device is not None and device.type == "meta":  # the base has no values to compare
            warnings.simplefilter("ignore", AdapterFileWarning)
        disha.load_adapter(model, path)
    with_adapter = _answers(model, tokenizer, questions)
    forgetting = None if own is None else own.forgotten(model)
    trainer = Trainer(
        model,
        training,
        train_dataset=outcome.checked,
        eval_dataset=outcome.checked,
        processing_class=tokenizer,
        callbacks=[AdapterCheckpoints(model)],
    )
    # Without training, DeepSpeed has ZeRO-3 only, and accelerate shards with an optimizer only.
    trainer.is_deepspeed_enabled = is_partitioned
    if trainer.is_fsdp_enabled:
        trainer.accelerator.prepare(model, trainer.create_optimizer())
    samples = [
        {
            "prompt": str(tokenizer.decode(question)),
            "without": before,
            "with_adapter": after,
            "reference": _text(tokenizer, reference),
        }
        for (question, reference), before, after in zip(pairs, without, with_adapter, strict=True)
    ]
    return Proof(outcome.loss, trainer.evaluate()["eval_loss"], samples, forgetting)


def _questions(rows: Dataset, count: int) -> Iterator[tuple[list[int], list[int]]]:
    """Return the first rows that begin with a question, each as its tokens and those learned."""
    asked = (row for row in rows if row["labels"][0] == -100)
    for row in itertools.islice(asked, max(count, 0)):
        learned = [label for label in row["labels"] if label != -100]
        start = row["labels"].index(learned[0])
        yield row["input_ids"][:start], learned


def _answers(model: Any, tokenizer: Any, questions: Sequence[list[int]]) -> list[str]:
    texts = []
    for question in tqdm(questions, desc="Answering"):
        ids = torch.tensor([question], device=model.device)
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=SAMPLE_TOKENS,
            do_sample=False,
        )
        texts.append(_text(tokenizer, found[0, len(question) :]))
    return texts


def _text(tokenizer: Any, tokens: Any) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True)


def _page(samples: Sequence[Sample]) -> str:
    parts = ["# With and without the adapter\n\nGreedy decoding.\n"]
    for number, sample in enumerate(samples, start=1):
        parts.append(f"## Sample {number}\n")
        for name, text in sample.items():
            # Indented text is shown as it is, whatever is in it.
            title = name.replace("_", " ").capitalize()
            shown = text.strip() if text.strip() else "-"
            parts.append(f"**{title}**\n\n{textwrap.indent(shown, ' ' * 4)}\n")
    return "\n".join(parts)


def facts_of(
    trainer: Trainer, measured_on: str, seconds: float, checkpoint: str | None
) -> dict[str, Any]:
    """Return what the report says of a training."""
    state = trainer.state
    summary = disha.summary(trainer.model)
    parameters = {"trainable": summary.trainable, "total": summary.total}
    rows = {"training": trainer.rows["train"], "measured": trainer.rows["eval"]}
    return {
        "parameters": parameters,
        "rows": rows,
        "steps": state.global_step,
        "resumed_from": checkpoint,
        "best_step": state.best_global_step,
        "measured_on": measured_on,
        "losses": read_log(state, "eval_loss"),
        "training_losses": read_log(state, "loss"),
        "seconds": seconds,
        "peak_memory_bytes": _peak_memory(trainer.args.device),
    }


def write_report(folder: Path, settings: Mapping[str, Any], outcome: Outcome, proof: Proof) -> None:
    """Write the plot, the samples and the report, and print the result."""
    facts = outcome.facts
    save(folder / PLOT, _plot(facts).savefig)
    if proof.samples:
        save_text(folder / SAMPLES, _page(proof.samples))
    versions = {"python": platform.python_version(), "disha": disha.__version__}
    versions |= {package: importlib.metadata.version(package) for package in PACKAGES}
    report = {
        "settings": settings,
        "versions": versions,
        "machine": platform.platform(),
        **facts,
        "proof": {"trained": proof.trained, "loaded": proof.loaded},
        "forgetting": proof.forgetting,
        "samples": proof.samples,
    }
    save_text(folder / REPORT, json.dumps(report, indent=2, default=str) + "\n")
    took = f"in {counted(facts['steps'], 'step')}, {facts['seconds']:.0f} s"
    print(f"{facts['measured_on']} loss {loss_before_and_after(facts, proof)} {took}")
    print(f"the saved file, in the base loaded anew: {proof.loaded:.6f}")
    if proof.forgetting is not None:
        print(f"forgetting: the loss on text of the base itself rose by {proof.forgetting:.3f}")
    names = sorted(path.name for path in folder.glob("[!.]*"))
    print(f"in {folder}: {', '.join(names)}")


def save_text(path: Path, text: str) -> None:
    """Write a text that is whole as soon as it is there."""
    save(path, lambda new: new.write_text(text, encoding="utf-8"))


def loss_before_and_after(facts: Mapping[str, Any], proof: Proof) -> str:
    """Return the loss before and after training, as text."""
    before = facts["losses"].get(0, math.nan)
    return f"{before:.3f} -> {proof.trained:.3f}"


def read_log(state: TrainerState, name: str) -> dict[Any, float]:
    """Return what a run has logged under a name, by step."""
    return {entry["step"]: entry[name] for entry in state.log_history if name in entry}


def _plot(facts: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    trained = facts["training_losses"]
    measured = facts["losses"]
    axes.plot(list(trained), list(trained.values()), label="training loss")
    label = f"{facts['measured_on']} loss"
    axes.plot(list(measured), list(measured.values()), marker="o", label=label)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _peak_memory(device: torch.device) -> int | None:
    """Return the most bytes on an accelerator; None where nobody counts them."""
    count = getattr(torch.get_device_module(device), "max_memory_allocated", None)
    return None if count is None else int(count(device))
