"""One run of `disha finetune`, from the words of a command line to the saved and proven adapter."""

from __future__ import annotations

import copy
import gc
import json
import os
import re
import shlex
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from filelock import FileLock, Timeout
from transformers import EarlyStoppingCallback
from transformers.trainer_utils import sort_checkpoints
from trl import is_conversational

import disha
from disha.errors import AdapterFileWarning, ArgumentError
from disha.files import ADAPTER_NAME
from disha.finetune.arguments import (
    TRAINER_STATE,
    AdapterArguments,
    DataArguments,
    TrainingArguments,
)
from disha.finetune.base import (
    Base,
    let_first_rank_load,
    load_tokenizer,
    loading_device,
    template_at,
)
from disha.finetune.card import write_card
from disha.finetune.course import Course, read_course, require_same_settings
from disha.finetune.data import load_rows, mix_rows
from disha.finetune.dry_run import BaseWithoutValues, preview
from disha.finetune.forms import form_rows, learns_marked_answers, marks_answers
from disha.finetune.merging import merge_base, require_mergeable
from disha.finetune.notes import (
    EOS_KEY,
    PROMPT_KEY,
    TEMPLATE_KEY,
    TOKENS_KEY,
    notes_at,
    read_noted_tokens,
    read_notes,
)
from disha.finetune.report import (
    MERGED,
    RESULTS,
    Outcome,
    facts_of,
    prove,
    read_log,
    write_report,
)
from disha.finetune.templates import try_template
from disha.finetune.trainer import Trainer
from disha.integrations.memory import memory_modes
from disha.integrations.transformers import AdapterCheckpoints
from disha.text import counted, group_by_reason

CHECKED_ROWS = 64
"""How many training rows stand for held-out rows where none are given."""

UNPROVEN = "unproven-adapter.safetensors"
"""The adapter of a run, until it is proven that the file is what was trained."""

CHECKPOINT = re.compile(r"(incomplete-)?checkpoint-\d+")
LOCK = ".lock"


@dataclass(frozen=True)
class Request:
    """What the flags ask for."""

    adapter: AdapterArguments
    data: DataArguments
    training: TrainingArguments

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.training.output_dir)

    def settings(self) -> dict[str, Any]:
        """Return the values of all flags, as plain ones."""
        training = self.training.to_sanitized_dict()
        for token in ("eos_token", "pad_token"):  # transformers hides them, as if they were secret
            training[token] = getattr(self.training, token, None)
        return {**vars(self.adapter), **vars(self.data), **training}


@dataclass(frozen=True)
class Run:
    """A trainer, and what the end of its run needs."""

    trainer: Trainer
    course: Course
    notes: Mapping[str, str]
    notes_of: Callable[[Path], dict[str, str]]
    """Takes the path of an adapter file, and returns the notes for it."""
    measured_on: str
    has_values: bool
    """Whether the base has its values on this rank, and not only on another."""


def run(
    argv: Sequence[str],
    adapter: AdapterArguments,
    data: DataArguments,
    training: TrainingArguments,
) -> int:
    """Run the command with what its words say, and return its exit code."""
    request = Request(adapter, data, training)
    base = _choose_base(adapter)
    if adapter.merge:
        require_mergeable(base.name)
    if training.dry_run:
        with tempfile.TemporaryDirectory() as nowhere:
            dry = copy.copy(training)
            dry.output_dir = nowhere
            _preview(base, replace(request, training=dry))
        return 0
    with _alone_in(request.folder, training):
        try:
            _run(base, request)
        except KeyboardInterrupt:
            if _find_checkpoint(request.folder):
                words = [word for word in argv if word != "--resume"]
                print(f"\nto go on: {shlex.join(['disha', 'finetune', *words, '--resume'])}")
            raise
    return 0


def _run(base: Base, request: Request) -> None:
    """Train, prove and report."""
    folder, training = request.folder, request.training
    course = Course(request.settings())
    checkpoint = _choose_checkpoint(training, folder)
    if checkpoint is not None:
        noted = read_course(checkpoint)
        require_same_settings(course, noted)
        course.seconds = noted.seconds
    training.eval_on_start = checkpoint is None
    run = _make_run(base, request, course)
    outcome = _train(run, folder, checkpoint)
    training = run.trainer.args
    del run
    gc.collect()  # the base is loaded again, and may fill the memory
    proof = prove(base, folder / UNPROVEN, training, outcome)
    proof.require_same(folder / UNPROVEN)
    if training.process_index > 0:
        return
    os.replace(folder / UNPROVEN, folder / ADAPTER_NAME)
    if request.adapter.merge:
        path = folder / ADAPTER_NAME
        merge_base(base.name, path, folder / MERGED, overwrite=True, in_model=True)
    write_card(folder, course.settings, outcome, proof)
    write_report(folder, course.settings, outcome, proof)


def _choose_base(adapter: AdapterArguments) -> Base:
    """Return the base that the flags name, or that the adapter notes."""
    if adapter.base is None:
        raise ArgumentError("which model? name it with --base")
    return Base(adapter.base, adapter.bits, adapter.attn_implementation)


# --- the output folder ---------------------------------------------------------------------------


@contextmanager
def _alone_in(folder: Path, training: TrainingArguments) -> Iterator[None]:
    """Keep other runs out of the folder. The system frees the lock of a run that is killed."""
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"--output_dir {folder} is a file; name a folder")
    if training.process_index > 0:  # the first rank has the lock
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ArgumentError(
            f"another run writes into {folder}; wait for its end, or name another --output_dir"
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows lets no open file go
            (folder / LOCK).unlink()
        lock.release()
        with suppress(OSError):  # it has files, unless the run was refused
            folder.rmdir()


def _choose_checkpoint(training: TrainingArguments, folder: Path) -> str | None:
    """Return the checkpoint to go on from, if any; raise if an earlier run would be mixed up."""
    if training.resume_from_checkpoint:
        return str(training.resume_from_checkpoint)
    last = _find_checkpoint(folder) if training.resume else None
    if last is not None or training.overwrite_output_dir:
        return last
    results = [path.name for path in _earlier_results(folder)]
    if not training.resume:
        if results:
            raise ArgumentError(
                f"--output_dir {folder} holds {results[0]} of an earlier run; go on with --resume, "
                "or start over with --overwrite_output_dir"
            )
        return None
    results = [name for name in results if not CHECKPOINT.fullmatch(name)]
    if results:
        raise ArgumentError(
            f"--output_dir {folder} holds {results[0]}, but no complete checkpoint to go on from; "
            "start over with --overwrite_output_dir"
        )
    print(f"there is no complete checkpoint in {folder}; starting at the beginning")
    return None


def _find_checkpoint(folder: Path) -> str | None:
    """Return the last complete checkpoint: `Trainer` writes its state last."""
    for path in reversed(sort_checkpoints(str(folder))):
        with suppress(OSError, ValueError):
            json.loads(Path(path, TRAINER_STATE).read_bytes())
            return str(path)
    return None


def _earlier_results(folder: Path) -> list[Path]:
    """Return what runs have left in a folder, and nothing else that is there."""
    paths = [folder / name for name in (ADAPTER_NAME, UNPROVEN, MERGED, *RESULTS)]
    paths += sorted(path for path in folder.glob("*") if CHECKPOINT.fullmatch(path.name))
    return [path for path in paths if path.exists()]


def _clear(folder: Path) -> None:
    for path in _earlier_results(folder):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


# --- model, adapter and rows ---------------------------------------------------------------------


def _make_run(base: Base, request: Request, course: Course) -> Run:
    """Return a trainer for a base with the adapter, and for the rows."""
    adapter, training = request.adapter, request.training
    sets, held_out = _read_sets(request.data)
    notes = _notes_of_run(adapter, training)
    # A row that can't be used raises here, before the base is loaded, which takes longer.
    tokenizer = load_tokenizer(base.name, notes)
    rows, held_out = _form_sets(sets, held_out, request, tokenizer)
    let_first_rank_load(base, training)
    device = loading_device(base, training)
    has_values = device is None or device.type != "meta"
    model, tokenizer = base.load(device, notes)
    notes[PROMPT_KEY] = "chat" if is_conversational(rows[0]) else "text"
    # Each checkpoint holds the notes that the final file holds, so that commands can use it.
    notes_of = partial(notes_at, notes=notes, base=base.name, bits=base.bits)
    with base.mode():
        _adapt(model, adapter, tokenizer, has_values)
    if training.fp16:
        _widen_trained(model)
    measured = rows.select(range(min(len(rows), CHECKED_ROWS))) if held_out is None else held_out
    callbacks = [AdapterCheckpoints(model, notes=notes_of), course]
    if training.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(training.early_stopping_patience))
    trainer = Trainer(
        model,
        _for_trl(training, rows, tokenizer),
        train_dataset=rows,
        eval_dataset=measured,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    measured_on = "training" if held_out is None else "held-out"
    return Run(trainer, course, notes, notes_of, measured_on, has_values)


def _for_trl(training: TrainingArguments, rows: Dataset, tokenizer: Any) -> TrainingArguments:
    """Return the flags as trl takes them, once the rows have their form."""
    taken = copy.copy(training)
    taken.chat_template_path = None  # it is the tokenizer's; trl would also add another's tokens
    if training.assistant_only_loss is None:
        learns_all = training.completion_only_loss is False
        taken.assistant_only_loss = not learns_all and learns_marked_answers(rows, tokenizer)
    return taken


def _read_sets(data: DataArguments) -> tuple[list[Dataset], Dataset | None]:
    """Return the data sets to train on, and the rows to measure on if they are apart."""
    if not data.data:
        raise ArgumentError("which rows? name a file or a data set with --data")
    splits = data.dataset_split
    if len(splits) == 1:
        splits = splits * len(data.data)
    if len(splits) != len(data.data):
        raise ArgumentError("give one --dataset_split for all data, or one for each")
    sets = [load_rows(name, split) for name, split in zip(data.data, splits, strict=True)]
    if data.eval_data is None and data.eval_split is None:
        return sets, None
    measured_on = data.data[0] if data.eval_data is None else data.eval_data
    split = "train" if data.eval_split is None else data.eval_split
    return sets, load_rows(measured_on, split)


def _notes_of_run(adapter: AdapterArguments, training: TrainingArguments) -> dict[str, str]:
    """Return the notes of the adapter that is trained further, with what the flags add."""
    notes = {}
    if adapter.adapter is not None:
        notes = read_notes(adapter.adapter)
        try_template(adapter.adapter, notes)
    if training.chat_template_path:
        notes[TEMPLATE_KEY] = template_at(training.chat_template_path)
    if adapter.new_tokens:
        notes[TOKENS_KEY] = json.dumps(adapter.new_tokens)
    if training.eos_token:
        notes[EOS_KEY] = training.eos_token
    return notes


def _form_sets(
    sets: list[Dataset], held_out: Dataset | None, request: Request, tokenizer: Any
) -> tuple[Dataset, Dataset | None]:
    """Return the rows to train on, mixed, and those held out, in the forms that trl trains."""
    data, training = request.data, request.training
    if training.assistant_only_loss and not marks_answers(tokenizer):
        raise ArgumentError(
            "--assistant_only_loss True needs a chat template in which trl can mark the answers; "
            "give one with --chat_template_path, or leave the flag out"
        )
    learn_all = training.assistant_only_loss is False
    sets = [form_rows(rows, data.dataset_field, tokenizer, learn_all=learn_all) for rows in sets]
    if held_out is not None:
        held_out = form_rows(held_out, data.dataset_field, tokenizer, learn_all=learn_all)
    elif data.eval_fraction:
        if not data.data_weights:
            sets = [mix_rows(sets, (), training.seed)]
        # Before rows are drawn by weight: a row that is drawn twice must not be in both parts.
        try:
            parts = [rows.train_test_split(data.eval_fraction, seed=training.seed) for rows in sets]
        except ValueError as error:
            raise ArgumentError(f"--eval_fraction {data.eval_fraction}: {error}") from error
        sets = [part["train"] for part in parts]
        held_out = mix_rows([part["test"] for part in parts], (), training.seed)
    rows = mix_rows(sets, data.data_weights, training.seed)
    return rows, held_out


def _adapt(model: Any, adapter: AdapterArguments, tokenizer: Any, has_values: bool = True) -> None:
    """Add the adapter: a new one, or that of a file, which must be of this base."""
    if adapter.adapter is None:
        _inject(model, adapter, tokenizer)
        return
    action: Literal["error", "ignore"] = "error" if has_values else "ignore"
    with warnings.catch_warnings(action=action, category=AdapterFileWarning):
        disha.load_adapter(model, adapter.adapter)


def _widen_trained(model: Any) -> None:
    """Hold what trains in float32, because torch's loss scaling takes no float16 parameters."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            parameter.data = parameter.data.float()


def _inject(model: Any, adapter: AdapterArguments, tokenizer: Any) -> None:
    """Add a new adapter, as the flags say."""
    settings = adapter.settings_for(model)
    table = model.get_input_embeddings()
    head = model.get_output_embeddings()
    patterns = {module: f"^{re.escape(name)}$" for name, module in model.named_modules()}
    if adapter.new_tokens:
        numbers = tokenizer.convert_tokens_to_ids(adapter.new_tokens)
        tables = [layer for layer in (table, head) if layer is not None]
        settings["also_train_rows"] = {patterns[layer]: numbers for layer in tables}
    disha.inject_adapters(model, **settings)


# --- training ------------------------------------------------------------------------------------


def _train(run: Run, folder: Path, checkpoint: str | None) -> Outcome:
    """Train, save the adapter, and return what is left to prove and to report."""
    trainer = run.trainer
    training = trainer.args
    if training.process_index == 0:
        print(str(disha.summary(trainer.model)).splitlines()[-1])
        rows = counted(trainer.rows["train"], "row")
        print(f"{rows}, measured on {trainer.rows['eval']:,}")
        if checkpoint is None and training.overwrite_output_dir:
            _clear(folder)
    if checkpoint is not None:
        if run.has_values:
            _require_same_base(trainer, checkpoint)
        if not (training.fsdp or training.deepspeed):  # they have files of their own
            _warn_of_lost_state(Path(checkpoint))
    _warn_of_idle_weights(run)
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = run.course.total_seconds()
    state = trainer.state
    saved_step = state.global_step
    if training.load_best_model_at_end and state.best_global_step:
        saved_step = state.best_global_step
    disha.save_adapter(trainer.model, folder / UNPROVEN, metadata=run.notes_of(folder / UNPROVEN))
    if TOKENS_KEY in run.notes and training.process_index == 0:
        trainer.processing_class.save_pretrained(folder)
    loss = read_log(state, "eval_loss").get(saved_step)
    if loss is None:
        loss = trainer.evaluate()["eval_loss"]
    facts = facts_of(trainer, run.measured_on, seconds, checkpoint)
    return Outcome(trainer.eval_dataset, loss, facts)


def _require_same_base(trainer: Trainer, checkpoint: str) -> None:
    """Load a checkpoint, which raises if its base is another one. `Trainer` would not notice."""
    with warnings.catch_warnings(action="error", category=AdapterFileWarning):
        disha.load_adapter(trainer.model, checkpoint, replace=True)


def _warn_of_idle_weights(run: Run) -> None:
    """Name the weights whose adapter does not act on the first tokens, or gets no gradient."""
    trainer = run.trainer
    training = trainer.args
    if training.world_size > 1 or training.fsdp or training.deepspeed:
        return  # they change the model once it trains
    new_tokens = trainer.processing_class.convert_tokens_to_ids(read_noted_tokens(run.notes))
    tokens = torch.tensor([[*new_tokens, *trainer.train_dataset[0]["input_ids"][:16]]])
    model = trainer.model
    with trainer.accelerator.autocast():
        report = disha.check_adapters(model, merging=False, input_ids=tokens.to(model.device))
    if not report.ok:
        reasons = group_by_reason((weight.name, weight.reason) for weight in report.problems)
        warnings.warn("; ".join(reasons), stacklevel=2)


def _warn_of_lost_state(checkpoint: Path) -> None:
    """Warn of a checkpoint that lacks states: `Trainer` would start with new ones, in silence."""
    lost = [name for name in ("optimizer.pt", "scheduler.pt") if not (checkpoint / name).exists()]
    if lost:
        warnings.warn(
            f"{checkpoint} has no {' and no '.join(lost)}, so these start from the beginning",
            stacklevel=2,
        )


# --- the dry run ---------------------------------------------------------------------------------


def _preview(base: Base, request: Request) -> None:
    """Print what a run would do. No weight of the base is read."""
    fake, _ = memory_modes()
    # The trainer has the plan and the rows. It would ask quantised weights for values.
    plain = BaseWithoutValues(base.name, "bf16", base.attn_implementation, fake)
    run = _make_run(plain, request, Course({}))

    def make_model(fake: Any) -> Any:
        other = BaseWithoutValues(base.name, base.bits, base.attn_implementation, fake)
        model, tokenizer = other.load(request.training.simulated_device, run.notes)
        with fake:
            _adapt(model, request.adapter, tokenizer)
        return model

    preview(run.trainer, make_model)
