"""One run of `disha finetune`, from the words of a command line to the saved and proven adapter."""

from __future__ import annotations

import copy
import gc
import json
import re
import shlex
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import is_conversational

import disha
from disha.errors import AdapterFileWarning, ArgumentError
from disha.files import ADAPTER_NAME
from disha.finetune.arguments import AdapterArguments, DataArguments, TrainingArguments
from disha.finetune.base import (
    Base,
    let_first_rank_load,
    load_tokenizer,
    loading_device,
    template_at,
)
from disha.finetune.card import write_card
from disha.finetune.data import load_rows, mix_rows
from disha.finetune.dry_run import preview
from disha.finetune.forms import form_rows, learns_marked_answers, marks_answers
from disha.finetune.merging import merge_base, require_mergeable
from disha.finetune.notes import (
    EOS_KEY,
    PROMPT_KEY,
    TEMPLATE_KEY,
    TOKENS_KEY,
    load_noted_adapter,
    notes_at,
    read_notes,
)
from disha.finetune.report import MERGED, RESULTS, Outcome, facts_of, prove, read_log, write_report
from disha.finetune.templates import try_template
from disha.finetune.trainer import Trainer
from disha.integrations.memory import memory_modes
from disha.integrations.transformers import AdapterCheckpoints
from disha.text import counted

CHECKED_ROWS = 64
"""How many training rows stand for held-out rows where none are given."""


def run(
    argv: Sequence[str],
    adapter: AdapterArguments,
    data: DataArguments,
    training: TrainingArguments,
) -> int:
    """Run the command with what its words say, and return its exit code."""
    base = _choose_base(adapter)
    if training.process_index == 0:
        print(training.choices)
    if adapter.merge:
        require_mergeable(base.name)
    if training.dry_run:
        with tempfile.TemporaryDirectory() as nowhere:
            training.output_dir = nowhere
            _preview(base, adapter, data, training)
        return 0
    folder = Path(training.output_dir)
    _require_free(folder, training)
    trainer = _make_trainer(base, adapter, data, training)
    try:
        outcome = _train(trainer, folder)
    except KeyboardInterrupt:
        if get_last_checkpoint(folder):  # type: ignore[no-untyped-call]
            words = [word for word in argv if word != "--resume"]
            print(f"\nto go on: {shlex.join(['disha', 'finetune', *words, '--resume'])}")
        raise
    del trainer
    gc.collect()  # the base is loaded again, and may fill the memory
    proof = prove(base, folder / ADAPTER_NAME, training, outcome)
    if training.process_index == 0:
        if adapter.merge:
            path = folder / ADAPTER_NAME
            merge_base(base.name, path, folder / MERGED, overwrite=True, in_model=True)
        settings = vars(adapter) | {"base": base.name, "bits": base.bits} | vars(data)
        settings |= training.to_sanitized_dict()
        write_card(folder, settings, outcome, proof)
        write_report(folder, settings, outcome, proof)
    proof.require_same()
    return 0


def _choose_base(adapter: AdapterArguments) -> Base:
    """Return the base that the flags name, or that the adapter notes."""
    if adapter.base is None:
        raise ArgumentError("which model? name it with --base")
    return Base(adapter.base, adapter.bits, adapter.attn_implementation)


# --- the output folder ---------------------------------------------------------------------------


def _require_free(folder: Path, training: TrainingArguments) -> None:
    """Raise if the folder holds an earlier run, unless the flags say what becomes of it."""
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"--output_dir {folder} is a file; name a folder")
    if training.resume or training.resume_from_checkpoint or training.overwrite_output_dir:
        return
    results = _earlier_results(folder)
    if results:
        raise ArgumentError(
            f"--output_dir {folder} holds {results[0].name} of an earlier run; go on with "
            "--resume, or start over with --overwrite_output_dir"
        )


def _earlier_results(folder: Path) -> list[Path]:
    names = [ADAPTER_NAME, MERGED, *RESULTS, "*checkpoint-*"]
    return [path for name in names for path in sorted(folder.glob(name))]


def _clear(folder: Path) -> None:
    for path in _earlier_results(folder):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


# --- model, adapter and rows ---------------------------------------------------------------------


def _make_trainer(
    base: Base,
    adapter: AdapterArguments,
    data: DataArguments,
    training: TrainingArguments,
) -> Trainer:
    """Return a trainer for a base with the adapter, and for the rows."""
    sets, held_out = _read_sets(data)
    notes = _notes_of_run(adapter, training)
    # A row that can't be used raises here, before the base is loaded, which takes longer.
    tokenizer = load_tokenizer(base.name, notes)
    rows, held_out = _form_sets(sets, held_out, data, training, tokenizer)
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
    trainer = Trainer(
        model,
        training,
        train_dataset=rows,
        eval_dataset=measured,
        processing_class=tokenizer,
        callbacks=[AdapterCheckpoints(model, notes=notes_of)],
    )
    if training.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(training.early_stopping_patience))
    trainer.measured_on = "training" if held_out is None else "held-out"
    trainer.notes_of = notes_of
    trainer.base_notes = notes
    trainer.has_values = has_values
    return trainer


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
        training.chat_template_path = None  # trl would also add the tokens of another model
    if adapter.new_tokens:
        notes[TOKENS_KEY] = json.dumps(adapter.new_tokens)
    if training.eos_token:
        notes[EOS_KEY] = training.eos_token
    return notes


def _form_sets(
    sets: list[Dataset],
    held_out: Dataset | None,
    data: DataArguments,
    training: TrainingArguments,
    tokenizer: Any,
) -> tuple[Dataset, Dataset | None]:
    """Return the rows to train on, mixed, and those held out, in the forms that trl trains."""
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
    if training.assistant_only_loss is None:
        learns_all = training.completion_only_loss is False
        training.assistant_only_loss = not learns_all and learns_marked_answers(rows, tokenizer)
    return rows, held_out


def _adapt(model: Any, adapter: AdapterArguments, tokenizer: Any, has_values: bool = True) -> None:
    """Add the adapter: a new one, or that of a file, which must be of this base."""
    if adapter.adapter is None:
        _inject(model, adapter, tokenizer)
        return
    action: Literal["error", "ignore"] = "error" if has_values else "ignore"
    with warnings.catch_warnings(action=action, category=AdapterFileWarning):
        load_noted_adapter(model, adapter.adapter)


def _widen_trained(model: Any) -> None:
    """Hold what trains in float32, because torch's loss scaling takes no float16 parameters."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            parameter.data = parameter.data.float()


def _inject(model: Any, adapter: AdapterArguments, tokenizer: Any) -> None:
    """Add a new adapter, as the flags say."""
    settings = adapter.settings()
    table = model.get_input_embeddings()
    head = model.get_output_embeddings()
    patterns = {module: f"^{re.escape(name)}$" for name, module in model.named_modules()}
    # trl computes the loss from the head's weight, and an adapter on it takes a dense one.
    if head is not None and head.weight is not table.weight:
        settings["exclude"].append(patterns[head])
    if adapter.new_tokens:
        numbers = tokenizer.convert_tokens_to_ids(adapter.new_tokens)
        tables = [layer for layer in (table, head) if layer is not None]
        settings["also_train_rows"] = {patterns[layer]: numbers for layer in tables}
    disha.inject_adapters(model, **settings)


# --- training ------------------------------------------------------------------------------------


def _train(trainer: Trainer, folder: Path) -> Outcome:
    """Train, save the adapter, and return what is left to prove and to report."""
    training = trainer.args
    if training.process_index == 0:
        print(str(disha.summary(trainer.model)).splitlines()[-1])
        rows = counted(len(trainer.train_dataset), "row")
        print(f"{rows}, measured on {len(trainer.eval_dataset):,}")
    resumed_from = _choose_checkpoint(training, folder)
    training.eval_on_start = resumed_from is None
    if resumed_from is not None:
        _require_same_base(trainer, resumed_from)
        if not (training.fsdp or training.deepspeed):  # they have files of their own
            _warn_of_lost_state(Path(resumed_from))
    elif training.process_index == 0:
        _clear(folder)
    trainer.train(resume_from_checkpoint=resumed_from)
    state = trainer.state
    saved_step = state.global_step
    if training.load_best_model_at_end and state.best_global_step:
        saved_step = state.best_global_step
    path = folder / ADAPTER_NAME
    notes = trainer.notes_of(path)
    disha.save_adapter(trainer.model, path, metadata=notes)
    if TOKENS_KEY in notes and training.process_index == 0:
        trainer.processing_class.save_pretrained(folder)
    loss = read_log(state, "eval_loss").get(saved_step)
    if loss is None:
        loss = trainer.evaluate()["eval_loss"]
    return Outcome(trainer.eval_dataset, loss, facts_of(trainer, resumed_from))


def _require_same_base(trainer: Trainer, checkpoint: str) -> None:
    """Load a checkpoint, which raises if its base is another one. `Trainer` would not notice."""
    if not trainer.has_values:
        return
    with warnings.catch_warnings(action="error", category=AdapterFileWarning):
        disha.load_adapter(trainer.model, checkpoint, replace=True)


def _warn_of_lost_state(checkpoint: Path) -> None:
    """Warn of a checkpoint that lacks states: `Trainer` would start with new ones, in silence."""
    lost = [name for name in ("optimizer.pt", "scheduler.pt") if not (checkpoint / name).exists()]
    if lost:
        warnings.warn(
            f"{checkpoint} has no {' and no '.join(lost)}, so these start from the beginning",
            stacklevel=2,
        )


def _choose_checkpoint(training: TrainingArguments, folder: Path) -> str | None:
    """Return the checkpoint to go on from, if one is asked for and there is one."""
    if training.resume_from_checkpoint:
        return training.resume_from_checkpoint
    if not training.resume:
        return None
    # Another rank may not have made the folder yet.
    last = get_last_checkpoint(folder) if folder.is_dir() else None  # type: ignore[no-untyped-call]
    if last is None:
        if (folder / ADAPTER_NAME).exists() and not training.overwrite_output_dir:
            raise ArgumentError(
                f"--output_dir {folder} holds an adapter, but no complete checkpoint to go on "
                "from; start over with --overwrite_output_dir"
            )
        print(f"there is no complete checkpoint in {folder}; starting at the beginning")
    return last


# --- the dry run ---------------------------------------------------------------------------------


def _preview(
    base: Base, adapter: AdapterArguments, data: DataArguments, training: TrainingArguments
) -> None:
    """Print what a run would do. No weight of the base is read."""
    fake, _ = memory_modes()
    # The trainer has the plan and the rows. It would ask quantised weights for values.
    plain = replace(base, bits="bf16", fake=fake)
    trainer = _make_trainer(plain, copy.deepcopy(adapter), data, training)

    def make_model(bits: str, fake: Any) -> Any:
        other = replace(base, bits=bits, fake=fake)
        model, tokenizer = other.load(training.simulated_device, trainer.base_notes)
        with fake:
            _adapt(model, copy.deepcopy(adapter), tokenizer)
        return model

    preview(trainer, base.bits, make_model)
