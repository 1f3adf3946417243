"""``disha finetune``: read, adapt, train, save, and prove that the file holds what was trained."""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import disha
from disha.files import ADAPTER_NAME, clear_drafts
from disha.finetune.adapting import inject
from disha.finetune.answering import TEMPLATE_KEY, Answerer
from disha.finetune.base_model import model_dtype
from disha.finetune.course import Course, train
from disha.finetune.data.encoding import Tally
from disha.finetune.data.rows import Row
from disha.finetune.errors import OutputError, SettingsError, TrainingError, VerificationError
from disha.finetune.folder_lock import FolderLock
from disha.finetune.inputs import Inputs, first_rows, load_inputs
from disha.finetune.merging import merge_into_base
from disha.finetune.metrics import METRICS
from disha.finetune.models.factory import explaining_failures
from disha.finetune.noted_base import BASE_KEY, base_note
from disha.finetune.preview import preview
from disha.finetune.progress import Clock
from disha.finetune.report import (
    Sample,
    environment,
    peak_memory,
    plot_learning_rates,
    plot_losses,
    samples_page,
    write_figure,
    write_text,
)
from disha.finetune.settings import FinetuneSettings, OutputSettings, SamplingSettings, require
from disha.finetune.stopping import Interrupted, listening, raising
from disha.finetune.training.checkpoints import Checkpoints
from disha.finetune.training.layers import compile_model, enable_gradient_checkpointing
from disha.finetune.training.machine import emulates_bf16, explaining_lack_of_memory
from disha.finetune.training.objectives import objective_for
from disha.finetune.training.parallel import (
    Processes,
    distribute,
    is_sharded,
    joined_processes,
    undistributed,
)
from disha.finetune.verification import Verification, verify_in_fresh_process
from disha.text import counted

__all__ = ["finetune"]

MERGED = "merged"
LOSSES, RATES = "loss.png", "learning_rate.png"
ANSWERS = "samples.md"
REPORT = "report.json"
SAMPLE_TOKENS = 48
"""Largest number of tokens of the answer in a sample."""

SAMPLE_SECONDS = 30.0
"""About how long all samples may take together."""


def finetune(settings: FinetuneSettings) -> dict[str, Any] | None:
    """Fine-tune a model, and write the adapter, metrics, plots, samples and report.

    Under torchrun, several processes do this together.

    Args:
        settings: the settings of the run.

    Returns:
        The report, as in ``report.json``; None for a dry run, and if there is nothing to resume.

    Raises:
        DishaError: the input can't be used, or the work failed.
        Interrupted: a signal asked to stop; the message says how to go on.
    """
    with (
        listening(),
        joined_processes() as processes,
        explaining_lack_of_memory(),
        ExitStack() as held,
    ):
        settings.check()
        clock = Clock(prints=processes.is_main)
        lock = FolderLock(settings.output.output)
        if not settings.dry_run:
            processes.on_main(lambda: held.enter_context(lock.held()))
            processes.on_main(lambda: _clear_drafts(lock.folder.resolve()))
        if processes.on_main(lambda: _is_finished(settings.output)):
            clock.say(
                f"{lock.folder} holds a finished run, and no checkpoint to resume from: nothing "
                "to do; --overwrite_output_dir starts over"
            )
            return None
        now = processes.on_main(lambda: _now(settings.output))
        with clock.phase("reading data, opening the model"):
            inputs = load_inputs(settings, now)
        for path, count in zip(settings.data.data_path, inputs.drawn, strict=False):
            clock.say(f"an epoch draws {counted(count, 'row')} of {path}")
        output = settings.output
        if output.merge:
            _require_place_to_merge(inputs, lock.folder)
        if output.save_strategy == "no" and output.save_steps != OutputSettings().save_steps:
            clock.say("--save_steps acts only with --save_strategy steps, which is not given")
        in_bf16 = model_dtype(settings.model, processes.device) == torch.bfloat16
        if (settings.training.bf16 or in_bf16) and emulates_bf16(processes.device):
            clock.say(
                "this processor has no instructions for bfloat16, so products in it are many times "
                "slower than in float32; --bits fp32 without --bf16 is faster here"
            )
        if settings.dry_run:
            clock.say(preview(inputs, settings, processes.world_size))
            return None
        return _run(settings, inputs, processes, clock, lock)


def _clear_drafts(folder: Path) -> None:
    """Remove what a killed run has left of results that it was writing."""
    for name in (ADAPTER_NAME, MERGED, LOSSES, RATES, ANSWERS, REPORT, METRICS):
        clear_drafts([folder / name])


def _now(output: OutputSettings) -> float:
    """Return the time that the chat template sees: the present, or that of the run to resume."""
    earlier = Checkpoints(output.output).earlier_now() if output.resume else None
    return time.time() if earlier is None else earlier


def _require_place_to_merge(inputs: Inputs, output: Path) -> None:
    """Raise `SettingsError` if the base model is no folder, or holds the output folder."""
    folder = inputs.base.folder
    if folder is None:
        raise SettingsError(
            "--merge writes a checkpoint as a folder like that of the base model, but "
            f"{inputs.base.title} is not a folder; leave it out, and export the adapter with disha "
            "convert"
        )
    require(
        not output.resolve().is_relative_to(folder.resolve()),
        f"--merge can't write to --output_dir {output}, because it is in the folder of the base "
        f"model, {folder}; name a folder elsewhere",
    )


def _is_finished(output: OutputSettings) -> bool:
    """Return whether a run is to resume, and its folder holds a finished run and no checkpoint.

    Raises:
        SettingsError: there are results of an earlier run, and no flag says what to do with them.
    """
    folder = output.output
    if output.overwrite_output_dir or not folder.is_dir():
        return False
    checkpoints = Checkpoints(folder).newest_first()
    results = [name for name in (ADAPTER_NAME, MERGED) if (folder / name).exists()]
    if output.resume:
        return bool(results) and not checkpoints
    if checkpoints:
        raise SettingsError(
            f"--output_dir {folder} holds {checkpoints[0].name} of an earlier run; continue it "
            "with --resume, start over with --overwrite_output_dir, or name another folder"
        )
    if results:
        raise SettingsError(
            f"--output_dir {folder} holds {results[0]} of a finished run; start over with "
            "--overwrite_output_dir, or name another folder"
        )
    return False


def _run(
    settings: FinetuneSettings,
    inputs: Inputs,
    processes: Processes,
    clock: Clock,
    lock: FolderLock,
) -> dict[str, Any]:
    digest = hashlib.sha256()
    with clock.phase("reading the model"):
        model = inputs.base.load(processes.device, digest)
    torch.manual_seed(settings.training.seed)
    base = inject(model, settings.adapter, clock.say)
    _say_sizes(model, inputs, processes, clock)
    objective = objective_for(model, has_tokenizer=inputs.base.tokenizer is not None)
    if settings.training.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if settings.training.compile:
        compile_model(model)
    trained = distribute(objective, settings.training.strategy, processes)
    adapter = lock.folder / ADAPTER_NAME
    notes = _notes(settings, inputs, adapter)
    with raising(False):  # no signal comes between training and saving
        with explaining_failures(settings.model.model), explaining_lack_of_memory():
            course = train(trained, inputs, settings, processes, clock, lock, digest.hexdigest())
        _save(trained, adapter, notes, processes, lock)
    sharded = is_sharded(trained)
    verification = None

    with _naming_adapter(adapter), explaining_lack_of_memory():
        processes.check_signals()
        # With shards, no process has the complete model.
        is_asked = processes.is_main and not sharded
        samples = _samples(model, base, inputs, settings, clock) if is_asked else []
        if processes.is_main:
            _write_results(course, inputs, settings, samples)
            verification = _merge_and_verify(adapter, course, inputs, settings, clock)
        report = _report(settings, model, inputs, course, verification, samples, clock)
        if processes.is_main:
            text = json.dumps(report, indent=2, allow_nan=False) + "\n"
            write_text(lock.folder / REPORT, text)
        if verification is not None:
            verification.require_agreement(adapter)
        _say_result(settings, inputs, course, verification, clock)
    processes.barrier()
    return report


def _say_sizes(model: nn.Module, inputs: Inputs, processes: Processes, clock: Clock) -> None:
    parameters, checked = disha.summary(model), inputs.checked
    clock.say(
        f"training {parameters.trainable:,} of {parameters.total:,} parameters "
        f"({parameters.percent:.2f}%)"
    )
    clock.say(f"{counted(len(inputs.dataset.training), 'row')} to train on{inputs.tally.remarks}")
    tally = checked.tally if checked.held_out else Tally()
    clock.say(f"{counted(len(inputs.dataset.held_out), 'row')} held out{tally.remarks}")
    if processes.is_main and (shared := inputs.shared_rows()):
        clock.say(
            f"rows to train on that are also held out: {shared:,}; their loss says little about "
            "new rows"
        )


def _save(
    trained: nn.Module,
    adapter: Path,
    notes: dict[str, str],
    processes: Processes,
    lock: FolderLock,
) -> None:
    """Save the adapter. If that fails, save it in another folder, so that it is not lost."""
    model = undistributed(trained).model

    def save(path: Path) -> None:
        if is_sharded(trained):  # all processes gather it together
            disha.save_adapter(model, path, metadata=notes)
        else:
            processes.on_main(lambda: disha.save_adapter(model, path, metadata=notes))

    try:
        processes.on_main(lock.keep)
        save(adapter)
    except disha.AdapterStateError as error:  # values are not finite
        raise TrainingError(str(error)) from error
    except OSError as error:
        elsewhere = processes.on_main(lambda: Path(tempfile.mkdtemp(prefix="disha-"), ADAPTER_NAME))
        save(elsewhere)
        raise OutputError(f"{error}; the adapter was saved as {elsewhere} instead") from error


@contextmanager
def _naming_adapter(adapter: Path) -> Iterator[None]:
    """If the work after training fails or a signal comes, add to the message where the adapter is.

    Raises:
        OutputError: the work failed. The input was good enough to train, so it is not to blame.
    """
    try:
        yield
    except Interrupted as interruption:
        told = f"interrupted after training; the adapter is complete in {adapter}"
        raise Interrupted(interruption.number, told) from interruption
    except (OSError, disha.DishaError) as error:
        if adapter.exists() and isinstance(error, VerificationError):
            raise
        state = "is complete in" if adapter.exists() else "was deleted:"
        raise OutputError(f"{error}; the adapter {state} {adapter}") from error


def _notes(settings: FinetuneSettings, inputs: Inputs, adapter: Path) -> dict[str, str]:
    """Return the notes for the adapter file: the base model, and the template for queries."""
    notes = {"base_model": inputs.base.title}
    if settings.output.note_base:
        notes[BASE_KEY] = base_note(settings.model, inputs.base.path, adapter)
    if inputs.encoder is not None and inputs.encoder.template is not None:
        notes[TEMPLATE_KEY] = inputs.encoder.template.setting
    return notes


def _samples(
    model: nn.Module,
    base: Mapping[str, Tensor],
    inputs: Inputs,
    settings: FinetuneSettings,
    clock: Clock,
) -> list[Sample]:
    """Return answers from before and after training, if the rows have a query and a response."""
    encoder, count = inputs.encoder, settings.output.samples
    if encoder is None or encoder.template is None or not count:
        return []
    with clock.phase("sampling"):
        sampling = SamplingSettings(max_new_tokens=SAMPLE_TOKENS)
        answerer = Answerer(model.eval(), encoder.tokenizer, encoder.template, sampling, base)
        samples = []
        for row in clock.watched(itertools.islice(_uncut_rows(inputs), count), count, "sampling"):
            query, response = (row.text(name) for name in encoder.fields_of(row))
            before, after = (
                "".join(_timely(answer(query), SAMPLE_SECONDS / (2 * count)))
                for answer in (answerer.base_answer, answerer.answer)
            )
            samples.append(Sample(query, before, after, response))
        return samples


def _timely(pieces: Generator[str], seconds: float) -> Iterator[str]:
    """Yield the pieces of an answer, and stop after this many seconds."""
    end = time.monotonic() + seconds
    with closing(pieces):  # until then, an answer of the base model keeps the adapter turned off
        for piece in pieces:
            yield piece
            if time.monotonic() > end:
                yield " [... stopped, as it took too long]"
                return


def _uncut_rows(inputs: Inputs) -> Iterator[Row]:
    """Yield the rows that are not cut. The model has seen only a part of a cut row."""
    assert inputs.encoder is not None
    for row in first_rows(inputs.dataset):
        outcome = inputs.encoder.outcome(row)
        if outcome.example is not None and not outcome.is_cut:
            yield row


def _write_results(
    course: Course, inputs: Inputs, settings: FinetuneSettings, samples: list[Sample]
) -> None:
    folder, adapter, checked = settings.output.output, settings.adapter, inputs.checked.name
    title = f"{adapter.title} adapters, r = {adapter.bone_r}, on {inputs.base.title}"
    write_figure(folder / LOSSES, plot_losses(course.steps, course.evaluations, title, checked))
    write_figure(folder / RATES, plot_learning_rates(course.steps, title))
    if samples:
        write_text(folder / ANSWERS, samples_page(samples, checked))


def _merge_and_verify(
    adapter: Path, course: Course, inputs: Inputs, settings: FinetuneSettings, clock: Clock
) -> Verification | None:
    output = settings.output
    if output.merge:
        assert inputs.base.folder is not None
        with clock.phase("merging into a copy of the base model"):
            merge_into_base(
                inputs.base.folder,
                adapter,
                output.output / MERGED,
                # With fewer bits, the adapter was trained on a rounded copy of these weights.
                force=settings.model.bits != "fp32",
                overwrite=True,
            )
    if not output.verify:
        return None
    with clock.phase("verifying the file in a new process"):
        return verify_in_fresh_process(settings, adapter, inputs, course.after)


def _report(
    settings: FinetuneSettings,
    model: nn.Module,
    inputs: Inputs,
    course: Course,
    verification: Verification | None,
    samples: list[Sample],
    clock: Clock,
) -> dict[str, Any]:
    parameters = disha.summary(model)
    checked = inputs.checked
    return {
        # A config file can hold all of these, so the name of a config file is left out.
        "settings": {k: v for k, v in settings.to_json().items() if k != "config"},
        "model": inputs.base.title,
        **environment(),
        "parameters": {
            "trainable": parameters.trainable,
            "total": parameters.total,
            "percent": parameters.percent,
        },
        "data": {
            "training": {"rows": len(inputs.dataset.training), **asdict(inputs.tally)},
            "held_out": {"rows": len(inputs.dataset.held_out), **asdict(checked.tally)},
        },
        "loss": {
            "measured_on": checked.name,
            "before": course.before,
            "after": course.after,
            "by_step": course.evaluations,
            "saved_step": course.progress.step if course.best is None else course.best,
        },
        "training": {
            "steps": course.progress.step,
            "stopped_early": course.stopped_early,
            "seconds": course.progress.seconds,
            "tokens": course.tokens,
            "tokens_per_second": course.tokens_per_second,
            "resumed_from": course.resumed_from and str(course.resumed_from),
        },
        "samples": [asdict(sample) for sample in samples],
        "verification": None if verification is None else verification.to_json(),
        "phase_seconds": clock.seconds,
        "peak_memory_bytes": peak_memory(),
    }


def _say_result(
    settings: FinetuneSettings,
    inputs: Inputs,
    course: Course,
    verification: Verification | None,
    clock: Clock,
) -> None:
    steps = counted(course.progress.step, "step")
    clock.say(
        f"\n{inputs.checked.name} loss {course.before:.3f} -> {course.after:.3f}, in "
        f"{steps} and {course.progress.seconds:.0f} s of training"
    )
    if verification is not None:
        clock.say(
            f"new process: loaded adapter differs by {verification.loaded_difference:.1e}, "
            f"merged by {verification.merged_difference:.1e} (allowed: "
            f"{verification.tolerance.loaded:g} and {verification.tolerance.merged:g})"
        )
    paths = sorted(settings.output.output.iterdir())
    written = [path.name for path in paths if not path.name.startswith(".")]
    clock.say(f"in {settings.output.output}: {', '.join(written)}")
