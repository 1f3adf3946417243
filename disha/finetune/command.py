"""``disha finetune``: read, adapt, train, save, and prove that the file is what was trained."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

import disha
from disha.finetune.data.encoding import Encoded, encode_pairs
from disha.finetune.data.rows import Pair
from disha.finetune.data.sources import ShuffledExamples
from disha.finetune.errors import TrainingError
from disha.finetune.inputs import Inputs, load_inputs
from disha.finetune.models.decoder import Decoder, generate_greedily
from disha.finetune.progress import showing_progress
from disha.finetune.report import (
    Sample,
    environment,
    loss_plot,
    metrics_line,
    open_metrics,
    peak_memory,
    samples_page,
    write_file,
)
from disha.finetune.settings import FinetuneSettings
from disha.finetune.settings.adapter import ALL_PROJECTIONS
from disha.finetune.training.evaluation import mean_loss
from disha.finetune.training.loop import Step, TrainingPlan, training_steps
from disha.finetune.training.objectives import DecoderObjective
from disha.finetune.verification import Verification, verify_in_fresh_process

__all__ = ["finetune"]

SAMPLES = 3
SAMPLE_TOKENS = 48


def finetune(settings: FinetuneSettings) -> dict[str, Any]:
    """Fine-tune a model and write adapter, metrics, plot, samples and report.

    Args:
        settings: every choice of the run.

    Returns:
        The report, as in ``report.json``.

    Raises:
        DishaError: the input can't be used, or the work failed.
    """
    settings.check()
    clock = _Clock()
    with clock.phase("reading model and data"):
        inputs = load_inputs(settings)
    _adapt(inputs.model, settings)
    _say_data(inputs)
    course = _train(inputs, settings, clock)
    adapter = settings.output.output / "adapter.safetensors"
    disha.save_adapter(inputs.model, adapter)
    with clock.phase("drawing and sampling"):
        _write_plot(course, inputs, settings)
        _write_samples(inputs, settings)
    with clock.phase("verifying the file in a fresh process"):
        verification = verify_in_fresh_process(settings, adapter, inputs.checked, course.after)
    report = _report(settings, inputs, course, verification, clock)
    write_file(
        settings.output.output / "report.json", (json.dumps(report, indent=2) + "\n").encode()
    )
    verification.require_agreement(adapter)
    _say_result(settings, inputs, course, verification)
    return report


@dataclass(frozen=True)
class _Course:
    """How training went.

    Args:
        steps: every optimiser step.
        evaluations: the loss on the checked rows, by the number of steps done before.
    """

    steps: tuple[Step, ...]
    evaluations: Mapping[int, float]

    @property
    def before(self) -> float:
        return self.evaluations[0]

    @property
    def after(self) -> float:
        return self.evaluations[self.steps[-1].step]

    @property
    def seconds(self) -> float:
        return self.steps[-1].seconds

    @property
    def tokens(self) -> int:
        return sum(step.tokens for step in self.steps)


class _Clock:
    """Says what is being done, and how long it took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        print(f"{name} ...", flush=True)
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
        print(f"  {self.seconds[name]:.1f} s", flush=True)


def _adapt(model: Decoder, settings: FinetuneSettings) -> None:
    torch.manual_seed(settings.training.seed)
    disha.inject_adapters(
        model,
        settings.adapter.target or ALL_PROJECTIONS,
        settings.adapter.bone_r,
        method=settings.adapter.kind,
        dtype=torch.float32,
    )
    parameters = disha.summary(model)
    print(
        f"training {parameters.trainable:,} of {parameters.total:,} parameters "
        f"({parameters.percent:.2f}%)"
    )


def _say_data(inputs: Inputs) -> None:
    for role, encoded in (("to train on", inputs.training), ("held out", inputs.held_out)):
        line = f"{len(encoded.examples)} rows {role}"
        if encoded.cut:
            line += f", {encoded.cut} with the end of the query cut off"
        if encoded.dropped:
            line += f"; {encoded.dropped} left out as too long"
        print(line, flush=True)


def _train(inputs: Inputs, settings: FinetuneSettings, clock: _Clock) -> _Course:
    objective, plan = DecoderObjective(inputs.model), _plan(settings)
    source = ShuffledExamples(
        inputs.training.examples,
        settings.training.per_device_train_batch_size,
        settings.training.seed,
    )
    planned = plan.steps(source.batches_per_epoch())
    steps: list[Step] = []
    evaluations: dict[int, float] = {}

    def evaluate() -> float:
        return _finite(mean_loss(objective, inputs.checked), inputs.checked_name)

    with open_metrics(settings.output.output / "metrics.jsonl") as metrics:
        with clock.phase(f"measuring the {inputs.checked_name} loss before training"):
            evaluations[0] = evaluate()
        metrics.write(json.dumps({"step": 0, "eval_loss": evaluations[0]}) + "\n")
        with (
            clock.phase("training, with evaluations"),
            showing_progress(planned, settings.output.logging_steps) as show,
        ):
            for step in training_steps(objective, source, plan, evaluate):
                metrics.write(metrics_line(step))
                show(step)
                steps.append(step)
                if step.eval_loss is not None:
                    evaluations[step.step] = step.eval_loss
    return _Course(tuple(steps), evaluations)


def _finite(loss: float, name: str) -> float:
    if not math.isfinite(loss):
        raise TrainingError(
            f"the {name} loss is {loss}, which must be finite; "
            "use --bits fp32 or a lower --learning_rate, or check the model file"
        )
    return loss


def _plan(settings: FinetuneSettings) -> TrainingPlan:
    return TrainingPlan(
        accumulation=settings.training.gradient_accumulation_steps,
        epochs=settings.training.num_train_epochs,
        max_steps=settings.training.max_steps,
        learning_rate=settings.training.learning_rate,
        weight_decay=settings.training.weight_decay,
        warmup_ratio=settings.training.warmup_ratio,
        max_gradient_norm=settings.training.max_grad_norm,
        eval_steps=settings.output.eval_steps,
    )


def _write_plot(course: _Course, inputs: Inputs, settings: FinetuneSettings) -> None:
    adapter = settings.adapter
    title = f"{adapter.title} adapters, r = {adapter.bone_r}, on {inputs.model_path.stem}"
    plot = loss_plot(course.steps, course.evaluations, title, inputs.checked_name)
    write_file(settings.output.output / "loss.png", plot)


def _write_samples(inputs: Inputs, settings: FinetuneSettings) -> None:
    rows = inputs.dataset.held_out or inputs.dataset.training
    encoded = (
        (pair, encode_pairs([pair], inputs.tokenizer, settings.data.max_seq_length))
        for pair in rows
    )
    # A query that was cut would be shown whole beside what the model made of a part.
    whole = (
        (pair, one.examples[0].prompt) for pair, one in encoded if one.examples and not one.cut
    )
    samples = [_sample(inputs, pair, prompt) for pair, prompt in itertools.islice(whole, SAMPLES)]
    page = samples_page(samples, inputs.checked_name)
    write_file(settings.output.output / "samples.md", page.encode())


def _sample(inputs: Inputs, pair: Pair, prompt: tuple[int, ...]) -> Sample:
    room = inputs.model.config.context - len(prompt)

    def answer() -> str:
        tokens = generate_greedily(
            inputs.model,
            prompt,
            max_new_tokens=min(SAMPLE_TOKENS, room),
            stop=inputs.tokenizer.end,
        )
        return inputs.tokenizer.decode(list(tokens))

    inputs.model.eval()
    with disha.adapters_disabled(inputs.model):
        before = answer()
    return Sample(pair.query, before, answer(), pair.response)


def _report(
    settings: FinetuneSettings,
    inputs: Inputs,
    course: _Course,
    verification: Verification,
    clock: _Clock,
) -> dict[str, Any]:
    parameters = disha.summary(inputs.model)
    return {
        "settings": settings.to_json(),
        "model": str(inputs.model_path),
        **environment(),
        "parameters": {
            "trainable": parameters.trainable,
            "total": parameters.total,
            "percent": parameters.percent,
        },
        "data": {
            "training": _data_report(inputs.training),
            "held_out": _data_report(inputs.held_out),
        },
        "loss": {
            "measured_on": inputs.checked_name,
            "before": course.before,
            "after": course.after,
            "by_step": course.evaluations,
        },
        "training": {
            "steps": len(course.steps),
            "seconds": course.seconds,
            "tokens": course.tokens,
            "tokens_per_second": course.tokens / course.seconds,
        },
        "verification": {
            **asdict(verification),
            "loaded_difference": verification.loaded_difference,
            "merged_difference": verification.merged_difference,
            "agrees": verification.agrees,
        },
        "phase_seconds": clock.seconds,
        "peak_memory_bytes": peak_memory(),
    }


def _data_report(encoded: Encoded) -> dict[str, int]:
    return {
        "rows": len(encoded.examples),
        "queries_cut": encoded.cut,
        "rows_left_out": encoded.dropped,
        "supervised_tokens": sum(example.supervised for example in encoded.examples),
    }


def _say_result(
    settings: FinetuneSettings, inputs: Inputs, course: _Course, verification: Verification
) -> None:
    print(
        f"\n{inputs.checked_name} loss {course.before:.3f} -> {course.after:.3f} nats per token, "
        f"in {len(course.steps)} steps and {course.seconds:.0f} s of training\n"
        f"fresh process: loaded adapter differs by {verification.loaded_difference:.1e}, "
        f"merged by {verification.merged_difference:.1e} (allowed: "
        f"{verification.tolerance.loaded:g} and {verification.tolerance.merged:g})\n"
        f"in {settings.output.output}: adapter.safetensors, metrics.jsonl, loss.png, samples.md, "
        "report.json"
    )
