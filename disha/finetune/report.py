"""What a run writes beside the adapter, and the proof that the saved file is the trained one."""

from __future__ import annotations

import copy
import importlib.metadata
import itertools
import json
import math
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData
from matplotlib.figure import Figure
from transformers import TrainerState
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import SFTConfig

import disha
from disha.errors import DishaError
from disha.files import save
from disha.finetune.forgetting import CURVE, OWN_TEXT, make_axes, own_text
from disha.finetune.source import is_gguf
from disha.finetune.trainer import Trainer
from disha.integrations.transformers import AdapterCheckpoints
from disha.text import counted

CARD, MERGED = "README.md", "merged"
PLOT, SAMPLES, REPORT = "loss.png", "samples.md", "report.json"
UNPROVEN = "unproven-adapter.safetensors"
"""The adapter of a run, until it is proven that the file is what was trained."""

PACKAGES = ("torch", "transformers", "trl", "datasets", "accelerate", "safetensors", "einops")
SAMPLE_TOKENS = 64
TOLERANCE = 1e-3
"""How much the loss of the saved file may differ, in nats per token. It differs at all only where
a device does not always add up in the same order."""

Report = dict[str, Any]
"""What is known of a run, as `report.json` has it."""


def facts_of(trainer: Trainer) -> Report:
    """Return what the report says of a training."""
    state = trainer.state
    summary = disha.summary(trainer.model)
    seconds = read_log(state, "train_runtime")[state.global_step]
    return {
        "seconds": seconds,
        "parameters": {"trainable": summary.trainable, "total": summary.total},
        "rows": {"training": trainer.rows["train"], "measured": trainer.rows["eval"]},
        "steps": state.global_step,
        "best_step": best_step(trainer),
        "losses": read_log(state, "eval_loss"),
        "training_losses": read_log(state, "loss"),
        "peak_memory_bytes": _peak_memory(trainer.args.device),
    }


def best_step(trainer: Trainer) -> int | None:
    """Return the step whose checkpoint was loaded as the best one, if any."""
    checkpoint = trainer.state.best_model_checkpoint
    if checkpoint is None or not trainer.args.load_best_model_at_end:
        return None
    return int(checkpoint.rpartition("-")[2])


def read_log(state: TrainerState, name: str) -> dict[Any, float]:
    """Return what a run has logged under a name, by step."""
    return {entry["step"]: entry[name] for entry in state.log_history if name in entry}


def _peak_memory(device: torch.device) -> int | None:
    """Return the most bytes on an accelerator; None where nobody counts them."""
    count = getattr(torch.get_device_module(device), "max_memory_allocated", None)
    return None if count is None else int(count(device))


# --- the proof -----------------------------------------------------------------------------------


def load_and_compare(model: Any, tokenizer: Any, path: Path, rows: Dataset, count: int) -> Report:
    """Load a saved adapter into its base, and return what it changes: answers, and forgetting."""
    questions = list(itertools.islice(_questions(rows), count))
    without = [_answer(model, tokenizer, question) for question, _ in questions]
    own = own_text(model, tokenizer, path.parent / OWN_TEXT) if count else None
    disha.load_adapter(model, path)
    samples = [
        {
            "prompt": tokenizer.decode(question),
            "without": before,
            "with_adapter": _answer(model, tokenizer, question),
            "reference": tokenizer.decode(reference, skip_special_tokens=True),
        }
        for (question, reference), before in zip(questions, without, strict=True)
    ]
    forgetting = None if own is None else own.forgotten(model)
    return {"forgetting": forgetting, "samples": samples}


def measure_again(model: Any, tokenizer: Any, rows: Dataset, training: SFTConfig) -> float:
    """Return the loss of a model with a saved adapter, measured as in training."""
    training = copy.copy(training)
    training.report_to = []
    training.assistant_only_loss = False  # the rows have their labels
    training.deepspeed_plugin = None  # accelerate keeps the first one
    training.dataset_kwargs = {"skip_prepare_dataset": True}  # packed rows can't be packed again
    trainer = Trainer(
        model,
        training,
        train_dataset=rows,  # trl wants some, also where none are trained
        eval_dataset=rows,
        processing_class=tokenizer,
        callbacks=[AdapterCheckpoints(model)],
    )
    # Without training, DeepSpeed has ZeRO-3 only, and accelerate shards with an optimizer only.
    trainer.is_deepspeed_enabled = is_deepspeed_zero3_enabled()  # type: ignore[no-untyped-call]
    if trainer.is_fsdp_enabled:
        trainer.accelerator.prepare(model, trainer.create_optimizer())
    loss: float = trainer.evaluate()["eval_loss"]
    return loss


def require_same(trained: float, loaded: float, path: Path) -> None:
    """Raise if the loss of a saved adapter is not that of the trained model."""
    if not abs(loaded - trained) <= TOLERANCE:
        raise DishaError(
            f"the saved adapter gives the loss {loaded:.6f}, and the trained model gave "
            f"{trained:.6f}; do not use the file, which stays as {path.name}"
        )


def _questions(rows: Dataset) -> Iterator[tuple[list[int], list[int]]]:
    """Give the first question of each row that begins with one, and its answer, as tokens."""
    for row in rows:
        labels = row["labels"]
        start = next((n for n, label in enumerate(labels) if label != -100), 0)
        if start:  # a packed row may have nothing to learn
            # What is learned later in a row answers other questions.
            answer = itertools.takewhile(lambda label: label != -100, labels[start:])
            yield row["input_ids"][:start], [*answer]


def _answer(model: Any, tokenizer: Any, question: Sequence[int]) -> str:
    ids = torch.tensor([question], device=model.device)
    mask = torch.ones_like(ids)
    found = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=SAMPLE_TOKENS, do_sample=False
    )
    text: str = tokenizer.decode(found[0, len(question) :], skip_special_tokens=True)
    return text


# --- what is written -----------------------------------------------------------------------------

SAMPLES_TEXT = """# With and without the adapter

Greedy decoding.
{% for sample in samples %}
## Sample {{ loop.index }}
{% for name, text in sample.items() %}
**{{ name | replace("_", " ") | capitalize }}**

{{ (text | trim or "-") | indent(first=True) }}
{% endfor %}
{%- endfor %}
"""
"""Indented text is shown as it is, whatever is in it."""

CARD_MARK = "library_name: disha"
CARD_TEXT = """---
{{ card_data }}
---

# An adapter for {{ title }}
{% set tile = "tile, r_out = " ~ settings.r_out %}
| | |
|---|---|
| base | {{ settings.base }} |
| held in memory as | {{ settings.bits }} |
| method | {{ tile if settings.r_out else settings.method }}, r = {{ settings.r }} |
| layers | {{ settings.target | join(", ") }} |
| trained parameters | {{ "{:,}".format(parameters.trainable) }} |
| rows | {{ "{:,}".format(rows.training) }} of {{ settings.data | join(", ") }} |
| steps | {{ "{:,}".format(steps) }} |
| learning rate | {{ settings.learning_rate }} |
| {{ measured_on }} loss | {{ change }} |
| made with | disha {{ versions.disha }} |

{% if samples %}`samples.md` shows answers with and without it.
{% endif %}`report.json` has all settings. The license is
yours to choose; those of the base and of the rows may bind you.

## Use

```sh
disha generate --adapter adapter.safetensors --prompt 'a question'
{%- if not is_gguf %}
disha merge {{ settings.base }} adapter.safetensors merged
{%- endif %}
```
{%- if not (is_gguf or settings.new_tokens) %}

```python
import disha
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{{ settings.base }}")
disha.load_adapter(model, "adapter.safetensors")
```
{%- endif %}
"""


def write_report(folder: Path, report: Report) -> None:
    """Write the plot, the samples, the report and the card, and print the result."""
    versions = {"python": platform.python_version(), "disha": disha.__version__}
    versions |= {package: importlib.metadata.version(package) for package in PACKAGES}
    report = {"versions": versions, "machine": platform.platform(), **report}
    save(folder / PLOT, _plot(report).savefig)
    for stale in (SAMPLES, CURVE):  # of the adapter of an earlier run
        (folder / stale).unlink(missing_ok=True)
    if report["samples"]:
        _save_text(folder / SAMPLES, jinja2.Template(SAMPLES_TEXT).render(report))
    _save_text(folder / REPORT, json.dumps(report, indent=2, default=str))
    before = report["losses"].get(0, math.nan)
    change = f"{before:.3f} -> {report['proof']['trained']:.3f}"
    _write_card(folder / CARD, {**report, "change": change})
    took = f"in {counted(report['steps'], 'step')}, {report['seconds']:.0f} s"
    print(f"{report['measured_on']} loss {change} {took}")
    print(f"the saved file, in the base loaded anew: {report['proof']['loaded']:.6f}")
    forgetting = report["forgetting"]
    if forgetting is not None:
        print(f"forgetting: the loss on text of the base itself rose by {forgetting:.3f}")
    names = sorted(path.name for path in folder.glob("[!.]*"))
    print(f"in {folder}: {', '.join(names)}")


def _write_card(path: Path, report: Report) -> None:
    """Write the card as the Hugging Face hub shows it, unless there is a `README.md` of a user."""
    if path.exists() and CARD_MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return
    base = report["settings"]["base"]
    head = ModelCardData(library_name="disha", tags=["adapter", "disha", "miss"])
    if not Path(base).exists():  # a path on this machine is no name that the hub knows
        head.base_model = base
    card = ModelCard.from_template(
        head, template_str=CARD_TEXT, title=Path(base).name, is_gguf=is_gguf(base), **report
    )
    _save_text(path, str(card))


def _save_text(path: Path, text: str) -> None:
    """Write a text that is whole as soon as it is there."""
    save(path, lambda new: new.write_text(f"{text}\n", encoding="utf-8"))


def _plot(report: Report) -> Figure:
    figure, axes = make_axes("optimizer step")
    trained = report["training_losses"]
    measured = report["losses"]
    axes.plot(list(trained), list(trained.values()), label="training loss")
    label = f"{report['measured_on']} loss"
    axes.plot(list(measured), list(measured.values()), marker="o", label=label)
    axes.legend()
    return figure
