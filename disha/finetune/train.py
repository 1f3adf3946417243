"""One run of `disha finetune`, from the words of a command line to the saved and proven adapter."""

from __future__ import annotations

import copy
import gc
import itertools
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
    AdapterArguments,
    DataArguments,
    TrainingArguments,
)
from disha.finetune.base import (
    Base,
    let_first_rank_load,
    load_tokenizer,
    load_without_values,
    loading_device,
    template_at,
)
from disha.finetune.card import write_card
from disha.finetune.course import (
    TRAINER_STATE,
    Course,
    read_course,
    require_same_settings,
)
from disha.finetune.data import load_rows, mix_rows
from disha.finetune.forms import form_rows, learns_marked_answers
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
    if adapter.base is None:
        raise ArgumentError("which model? name it with --base")
    if not data.data:
        raise ArgumentError("which rows? name a file or a data set with --data")
    request = Request(adapter, data, training)
    base = Base(adapter.base, adapter.bits, adapter.attn_implementation)
    if adapter.merge:
        require_mergeable(base.name)
    if training.dry_run:
        with tempfile.TemporaryDirectory() as nowhere:
            dry = copy.copy(training)
            dry.output_dir = nowhere
            _preview(_make_run(base, replace(request, training=dry), Course({})).trainer)
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


# --- the output folder ---------------------------------------------------------------------------


@contextmanager
def _alone_in(folder: Path, training: TrainingArguments) -> Iterator[None]:
    """Keep other runs out of the folder. The system frees the lock of a run that is killed."""
    if training.process_index > 0:  # the first rank has the lock
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(folder / LOCK, timeout=0).acquire()
    except Timeout as error:
        raise ArgumentError(
            f"another run writes into {folder}; wait for its end, or name another --output_dir"
        ) from error
    with held:
        yield


def _choose_checkpoint(training: TrainingArguments, folder: Path) -> str | None:
    """Return the checkpoint to go on from, if any; raise if an earlier run would be mixed up."""
    given = training.resume_from_checkpoint
    resumes = training.resume or given in ("True", "true")  # as in `Trainer`
    if given and given not in ("True", "true", "False", "false"):
        return str(given)
    last = _find_checkpoint(folder) if resumes else None
    if last is not None or training.overwrite_output_dir:
        return last
    results = [path.name for path in _earlier_results(folder)]
    if resumes:
        results = [name for name in results if not CHECKPOINT.fullmatch(name)]
    if results:
        raise ArgumentError(
            f"--output_dir {folder} holds {results[0]} of an earlier run; go on from a complete "
            "checkpoint with --resume, or start over with --overwrite_output_dir"
        )
    if resumes:
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
    notes = _notes_of_run(adapter, training)
    # A row that can't be used raises here, before the base is loaded, which takes longer.
    rows, held_out = _make_rows(request.data, training, load_tokenizer(base.name, notes))
    let_first_rank_load(base, training)
    device = loading_device(base, training)
    has_values = not training.dry_run and (device is None or device.type != "meta")
    if training.dry_run:
        model, tokenizer = load_without_values(base.name, notes)
    else:
        model, tokenizer = base.load(device, notes)
    notes[PROMPT_KEY] = "chat" if is_conversational(rows[0]) else "text"
    # Each checkpoint holds the notes that the final file holds, so that commands can use it.
    notes_of = partial(notes_at, notes=notes, base=base.name, bits=base.bits)
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


def _make_rows(
    data: DataArguments, training: TrainingArguments, tokenizer: Any
) -> tuple[Dataset, Dataset | None]:
    """Return the rows to train on, mixed, and those held out, in the forms that trl trains."""
    splits = data.dataset_split
    if len(splits) == 1:
        splits = splits * len(data.data)
    if len(splits) != len(data.data):
        raise ArgumentError("give one --dataset_split for all data, or one for each")

    def read(name: str, split: str) -> Dataset:
        learn_all = training.assistant_only_loss is False
        rows = load_rows(name, split)
        return form_rows(rows, data.dataset_field, tokenizer, learn_all=learn_all)

    sets = [read(name, split) for name, split in zip(data.data, splits, strict=True)]
    held_out = None
    if data.eval_data or data.eval_split:
        held_out = read(data.eval_data or data.data[0], data.eval_split or "train")
    elif data.eval_fraction:
        if not data.data_weights:
            sets = [mix_rows(sets, (), training.seed)]
        # Before rows are drawn by weight: a row that is drawn twice must not be in both parts.
        parts = [rows.train_test_split(data.eval_fraction, seed=training.seed) for rows in sets]
        sets = [part["train"] for part in parts]
        held_out = mix_rows([part["test"] for part in parts], (), training.seed)
    return mix_rows(sets, data.data_weights, training.seed), held_out


def _adapt(model: Any, adapter: AdapterArguments, tokenizer: Any, has_values: bool) -> None:
    """Add the adapter: a new one, or that of a file, which must be of this base."""
    if adapter.adapter is None:
        new_rows = tokenizer.convert_tokens_to_ids(adapter.new_tokens)
        disha.inject_adapters(model, **adapter.settings_for(model, new_rows))
        return
    action: Literal["error", "ignore"] = "error" if has_values else "ignore"
    with warnings.catch_warnings(action=action, category=AdapterFileWarning):
        disha.load_adapter(model, adapter.adapter)


def _widen_trained(model: Any) -> None:
    """Hold what trains in float32, because torch's loss scaling takes no float16 parameters."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            parameter.data = parameter.data.float()


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


def _preview(trainer: Trainer) -> None:
    """Print the plan, one row, and the steps."""
    print(disha.summary(trainer.model))
    row = trainer.train_dataset[0]
    print(f"\none of {counted(len(trainer.train_dataset), 'row')}; [[ ]] marks what is learned:")
    print(_mark_learned(row["input_ids"], row["labels"], trainer.processing_class))
    *_, steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    print(f"\n{counted(steps, 'step')}")


def _mark_learned(ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> str:
    text = ""
    pairs = zip(ids, labels, strict=True)
    for learned, run in itertools.groupby(pairs, key=lambda pair: pair[1] != -100):
        part = tokenizer.decode([token for token, _ in run])
        text += f"[[{part}]]" if learned else part
    return text
