"""One run of `disha finetune`, from its flags to the saved and proven adapter."""

from __future__ import annotations

import gc
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback
from trl import is_conversational

import disha
from disha.errors import AdapterFileWarning, ArgumentError
from disha.files import ADAPTER_NAME
from disha.finetune import preview
from disha.finetune.arguments import AdapterArguments, Flags, TrainingArguments
from disha.finetune.base import load_base
from disha.finetune.choices import choose_rate, describe
from disha.finetune.data import make_rows
from disha.finetune.forms import learns_marked_answers
from disha.finetune.merging import merge_base, require_mergeable
from disha.finetune.notes import (
    BASE_KEY,
    EOS_KEY,
    PROMPT_KEY,
    TEMPLATE_KEY,
    TOKENS_KEY,
    base_note,
    read_notes,
)
from disha.finetune.ranks import is_sharded, loading_device
from disha.finetune.report import (
    MERGED,
    UNPROVEN,
    Report,
    best_step,
    facts_of,
    load_and_compare,
    measure_again,
    read_log,
    require_same,
    write_report,
)
from disha.finetune.resuming import (
    Course,
    choose_checkpoint,
    clear,
    goes_on_in,
    require_same_settings,
    warn_of_lost_state,
)
from disha.finetune.templates import try_template
from disha.finetune.tokenizer import load_tokenizer, template_at
from disha.finetune.trainer import Trainer
from disha.integrations.transformers import AdapterCheckpoints
from disha.text import counted, group_by_reason

Notes = dict[str, str]


def run(flags: Flags) -> None:
    """Train an adapter, prove that its file holds it, and report; or show what a run would do."""
    adapter, data, training = flags
    if adapter.base is None:
        raise ArgumentError("which model? name it with --base")
    if not data.data:
        raise ArgumentError("which rows? name a file or a data set with --data")
    folder = Path(training.output_dir)
    final = folder / ADAPTER_NAME
    merged = folder / MERGED
    if adapter.merge:
        require_mergeable(adapter.base)
        disha.interop.checkpoints.check_target(merged, Path(adapter.base), final, overwrite=True)
    settings = _settings_of(flags)
    checkpoint = choose_checkpoint(training, adapter.base, adapter.adapter)
    if checkpoint is not None:
        require_same_settings(settings, checkpoint)
    if training.dry_run:
        _preview(flags)
        return
    training.eval_on_start = checkpoint is None
    trainer, notes_at = make_trainer(flags, settings)
    _train(trainer, adapter, checkpoint)
    path = folder / UNPROVEN
    disha.save_adapter(trainer.model, path, metadata=notes_at(path))
    loss = _loss_of_saved(trainer)
    facts = facts_of(trainer)
    eval_rows = trainer.eval_dataset
    del trainer
    gc.collect()  # the base is loaded again, and may fill the memory
    proof = _prove(flags, path, eval_rows, loss)
    if training.process_index > 0:
        return
    os.replace(path, final)
    if adapter.merge:
        # A base that is loaded can untie a table that is adapted; a copy of its files can't.
        merge_base(adapter.base, final, merged, overwrite=True, in_model=True)
    asked = {"settings": settings, "measured_on": data.measured_on, "resumed_from": checkpoint}
    settings["learning_rate"] = training.learning_rate
    write_report(folder, {**asked, **facts, **proof})


def _settings_of(flags: Flags) -> dict[str, Any]:
    """Return the values of all flags, as JSON has them."""
    adapter, data, training = flags
    settings = {**vars(adapter), **vars(data), **training.to_sanitized_dict()}
    for token in ("eos_token", "pad_token"):  # transformers hides them, as if they were secret
        settings[token] = getattr(training, token, None)
    return dict(json.loads(json.dumps(settings, default=str)))


# --- before training -----------------------------------------------------------------------------


def make_trainer(flags: Flags, settings: dict[str, Any]) -> tuple[Trainer, Callable[[Path], Notes]]:
    """Return a trainer for the base with the adapter, and for the rows; and what gives the notes.

    The notes name the base from where the adapter file is, so they depend on its path.
    """
    adapter, data, training = flags
    notes = _notes_of_run(adapter, training)
    # A row that can't be used raises here, before the base is loaded, which takes longer.
    tokenizer, added = load_tokenizer(str(adapter.base), notes)
    rows, eval_rows = make_rows(data, training, tokenizer)
    is_chat = is_conversational(rows[0])
    notes[PROMPT_KEY] = "chat" if is_chat else "text"
    training.chat_template_path = None  # it is the tokenizer's; trl would also add another's tokens
    if is_chat:  # trl learns all answers if it can mark them, and else the last one
        only_answers = not training.learns_all
        training.completion_only_loss = only_answers
        training.assistant_only_loss = only_answers and learns_marked_answers(rows, tokenizer)
    model = _make_model(flags, notes, (tokenizer, added))

    def notes_at(path: Path) -> Notes:
        return {**notes, BASE_KEY: base_note(str(adapter.base), adapter.bits, path)}

    # Each checkpoint holds the notes that the final file holds, so that commands can use it.
    callbacks = [AdapterCheckpoints(model, notes=notes_at), Course(settings)]
    if training.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(training.early_stopping_patience))
    trainer = Trainer(
        model,
        training,
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    if "labels" not in trainer.train_dataset.column_names:
        raise ArgumentError("rows that trl is not to prepare must have input_ids and labels")
    return trainer, notes_at


def _notes_of_run(adapter: AdapterArguments, training: TrainingArguments) -> Notes:
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


def _make_model(flags: Flags, notes: Notes, read: tuple[Any, int]) -> Any:
    """Return the base with the adapter that is trained, and choose a learning rate for it."""
    adapter, _, training = flags
    model, tokenizer = _load_base(flags, notes, read)
    if training.learning_rate is None:
        if not adapter.target:
            raise ArgumentError(f"{adapter.adapter} notes no targets; give a --learning_rate")
        chosen = choose_rate(disha.plan_adapters(model, **adapter.settings_for(model)))
        training.learning_rate = chosen["learning_rate"].value
        if training.process_index == 0:
            print(describe(chosen))
    if adapter.adapter is None:
        new_rows = {*tokenizer.convert_tokens_to_ids(adapter.new_tokens)}
        disha.inject_adapters(model, **adapter.settings_for(model, new_rows))
    else:
        _load_adapter(model, adapter.adapter, training)
    if training.fp16:  # torch's loss scaling takes no float16 parameters
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype == torch.float16:
                parameter.data = parameter.data.float()
    return model


def _load_base(flags: Flags, notes: Notes, read: tuple[Any, int] | None = None) -> tuple[Any, Any]:
    """Return the base and its tokenizer as this rank needs them, with what notes ask for."""
    adapter, _, training = flags
    name = str(adapter.base)
    return load_base(
        name,
        adapter.bits,
        loading_device(name, adapter.bits, training),
        notes,
        adapter.attn_implementation,
        read=read,
        has_values=not training.dry_run,
    )


def _load_adapter(model: Any, path: str, training: TrainingArguments, **options: Any) -> None:
    """Load an adapter, and raise if it is of another base, which the first rank can tell."""
    has_values = training.process_index == 0 and not training.dry_run
    action: Any = "error" if has_values else "ignore"
    with warnings.catch_warnings(action=action, category=AdapterFileWarning):
        disha.load_adapter(model, path, **options)


# --- training and proof --------------------------------------------------------------------------


def _train(trainer: Trainer, adapter: AdapterArguments, checkpoint: str | None) -> None:
    """Train from the beginning, or on from a checkpoint."""
    training = trainer.args
    if training.process_index == 0:
        print(str(disha.summary(trainer.model)).splitlines()[-1])
        rows = counted(trainer.rows["train"], "row")
        print(f"{rows}, measured on {trainer.rows['eval']:,}")
        folder = Path(training.output_dir)
        if training.overwrite_output_dir and not goes_on_in(folder, checkpoint):
            clear(folder)
    if checkpoint is not None:
        # `Trainer` would not notice that the base of a checkpoint is another one.
        _load_adapter(trainer.model, checkpoint, training, replace=True)
        warn_of_lost_state(checkpoint, training)
    _warn_of_idle_weights(trainer, adapter)
    trainer.train(resume_from_checkpoint=checkpoint)


def _warn_of_idle_weights(trainer: Trainer, adapter: AdapterArguments) -> None:
    """Name the weights whose adapter does not act on the first tokens, or gets no gradient."""
    training = trainer.args
    if training.world_size > 1 or training.fsdp or training.deepspeed:
        return  # they change the model once it trains
    new_tokens = trainer.processing_class.convert_tokens_to_ids(adapter.new_tokens)
    tokens = torch.tensor([[*new_tokens, *trainer.train_dataset[0]["input_ids"][:16]]])
    model = trainer.model
    with trainer.accelerator.autocast():
        report = disha.check_adapters(model, merging=False, input_ids=tokens.to(model.device))
    if not report.ok:
        reasons = group_by_reason((weight.name, weight.reason) for weight in report.problems)
        warnings.warn("; ".join(reasons), stacklevel=2)


def _loss_of_saved(trainer: Trainer) -> float:
    """Return the loss of the model as it is saved, which is the best one if the flags say so."""
    state = trainer.state
    loaded = best_step(trainer)
    if trainer.args.load_best_model_at_end and loaded != state.best_global_step:
        warnings.warn(
            f"the best step, {state.best_global_step}, has no checkpoint; give --save_steps the "
            "value of --eval_steps",
            stacklevel=2,
        )
    loss = read_log(state, "eval_loss").get(loaded or state.global_step)
    if loss is None:
        loss = trainer.evaluate()["eval_loss"]
    return loss


def _prove(flags: Flags, path: Path, rows: Dataset, loss: float) -> Report:
    """Load the saved adapter into its base, require this loss, and return what it does."""
    _, _, training = flags
    model, tokenizer = _load_base(flags, read_notes(path))
    # Sharded models would need all ranks for an answer.
    is_shown = training.process_index == 0 and not is_sharded(training)
    count = training.samples if is_shown else 0
    effect = load_and_compare(model, tokenizer, path, rows, count)
    loaded = measure_again(model, tokenizer, rows, training)
    require_same(loss, loaded, path)
    return {**effect, "proof": {"trained": loss, "loaded": loaded}}


def _preview(flags: Flags) -> None:
    """Show what a run would do, and write and report nothing."""
    adapter, _, training = flags
    training.report_to = []
    training.push_to_hub = False
    with tempfile.TemporaryDirectory() as nowhere:
        training.output_dir = nowhere
        trainer, _ = make_trainer(flags, {})
    if training.process_index == 0:
        preview.show(trainer, adapter.bits)
