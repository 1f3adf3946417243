"""Checkpoints of `Trainer`, and of trainers built on it, that hold the adapter and not the base.

Without this, each holds the complete model, and `Trainer` refuses a quantised model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

import disha
from disha.errors import ArgumentError
from disha.files import ADAPTER_NAME
from disha.files.disk import write_tensors
from disha.integrations.engines import kept_keys, leave_out_base
from disha.model.state import collect_tensors
from disha.model.view import ModelView
from disha.sharding.imported import imported_class

__all__ = ["AdapterCheckpoints"]

NO_MODEL = {
    "model_type": f"adapter of disha: load {ADAPTER_NAME} with disha.load_adapter",
    "quantization_config": {},
}
"""The configuration in a checkpoint, so that `from_pretrained` raises.

Otherwise, it would return a model of random weights.
`AutoModel` refuses the type, and its error says how to load the adapter. A class such as
`LlamaForCausalLM` ignores the type, but refuses a quantisation without a method.
"""

QUANTIZED = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")
"""What tells trainers that a model is quantised. They know adapters of PEFT only: `Trainer` refuses
the model, and the trainers of `trl` cast all trainable parameters to bfloat16."""

NotesAt = Callable[[Path], Mapping[str, str]]
"""Takes the path of an adapter file, and returns the notes for its metadata."""


def no_notes(path: Path) -> Mapping[str, str]:
    """Return no notes, whatever the path."""
    return {}


class AdapterCheckpoints(TrainerCallback):
    """Makes `Trainer` save, resume and choose the adapter alone.

    Make it before the trainer, and pass it in `callbacks`. Then

    - each checkpoint, and each folder of `trainer.save_model`, holds `adapter.safetensors`, which
      `disha.load_adapter` reads, and not the base;
    - `resume_from_checkpoint` and `load_best_model_at_end` load the adapter again, bit for bit;
    - a run that was killed while it wrote a checkpoint resumes from the one before: the next
      trainer sets the incomplete one aside, as `incomplete-checkpoint-N`;
    - `Trainer` accepts a quantised model;
    - `from_pretrained` of a checkpoint raises, and does not return a model without the adapter.

    `model.safetensors.index.json` in a checkpoint leads `Trainer` to `adapter.safetensors`, so the
    adapter is on disk once. FSDP and DeepSpeed write and read files of their own. With FSDP and
    ZeRO-3, only checkpoints hold `adapter.safetensors`, so call `disha.save_adapter` on all ranks
    after training.

    Args:
        model: a model of `transformers` with adapters.
        adapter: the name of the adapter to save.
        notes: takes the path of an adapter file, and returns the metadata to save in it. Paths in
            it can so be relative to the folder of the file.

    Raises:
        ArgumentError: the model has no such adapter, or another one is active and trains. The
            trainer raises it too, if it gets a `peft_config`.

    Examples:
        >>> import pathlib, tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
        >>> import disha
        >>> from disha.integrations.transformers import AdapterCheckpoints
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
        >>> config = LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes)
        >>> model = disha.inject_adapters(LlamaForCausalLM(config), "all-linear", r=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     args = TrainingArguments(folder, report_to=[])
        ...     trainer = Trainer(model, args, callbacks=[AdapterCheckpoints(model)])
        ...     trainer.save_model()  # as for each checkpoint
        ...     len(disha.inspect_adapter(pathlib.Path(folder, "adapter.safetensors")).layers)
        8
    """

    def __init__(
        self, model: nn.Module, adapter: str = "default", notes: NotesAt = no_notes
    ) -> None:
        self._saving = _AdapterSaving(model, adapter, notes)
        self._kept = kept_keys(model, adapter)
        self._quantized = [flag for flag in QUANTIZED if getattr(model, flag, False)]
        for flag in self._quantized:  # hidden while the trainer is made
            setattr(model, flag, False)
        model.save_pretrained = self._saving  # type: ignore[assignment]
        hook = partial(_load_file, adapter)  # unlike a closure, pickled with the model
        model.register_load_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]

    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Let the model be quantised again, and prepare the engine that writes checkpoints."""
        model = given["model"]
        if isinstance(model, imported_class("peft.peft_model", "PeftModel")):
            raise ArgumentError(
                "a peft_config has added an adapter of PEFT, beside which that of disha is frozen; "
                "leave it out"
            )
        for flag in self._quantized:
            setattr(model, flag, True)
        # Trainer warns of other missing keys than these when it loads a checkpoint.
        others = set(model.state_dict()) - self._kept
        self._saving.model._keys_to_ignore_on_save = others  # type: ignore[assignment]
        leave_out_base(model, self._kept, AcceleratorState().distributed_type)
        if args.should_save:
            _set_aside_incomplete(Path(args.output_dir))
        PartialState().wait_for_everyone()

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Write the adapter of a sharded model, for which all ranks must act together."""
        if not ModelView(given["model"]).is_sharded:
            return  # `save_pretrained` has written it
        folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        self._saving.write_adapter(folder)
        if args.should_save:
            # The engine reads its own files, and the adapter is in its file now.
            (folder / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)


@dataclass
class _AdapterSaving:
    """Stands for `model.save_pretrained`. It can be copied and pickled with the model."""

    model: nn.Module
    adapter: str
    notes: NotesAt

    def __call__(
        self,
        save_directory: str,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **named: Any,
    ) -> None:
        """Write the adapter into a folder. A sharded model comes with its state, gathered."""
        view = ModelView(self.model)
        if self.adapter not in view.adapters:  # merged into the base, or removed
            vars(self.model).pop("_keys_to_ignore_on_save", None)
            type(self.model).save_pretrained(  # type: ignore[attr-defined]
                self.model,
                save_directory,
                is_main_process=is_main_process,
                state_dict=state_dict,
                **named,
            )
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if not view.is_sharded:
            self.write_adapter(folder)
        if not is_main_process:
            return
        if view.is_sharded:
            write_tensors(folder / SAFE_WEIGHTS_NAME, state_dict or {})
        else:
            kept = disha.adapter_state_dict(self.model, self.adapter)
            index = {"metadata": {}, "weight_map": dict.fromkeys(kept, ADAPTER_NAME)}
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index))
        (folder / CONFIG_NAME).write_text(json.dumps(NO_MODEL))

    def write_adapter(self, folder: Path) -> None:
        """Write the adapter file, with its notes."""
        path = folder / ADAPTER_NAME
        disha.save_adapter(self.model, path, self.adapter, metadata=self.notes(path))


def _load_file(
    adapter: str, model: nn.Module, state: dict[str, Tensor], prefix: str, *unused: Any
) -> None:
    """Let `load_state_dict` read an adapter file, to which the index of a checkpoint leads.

    Its tensors are loaded, and nothing is left to load in the state.

    Raises:
        AdapterStateError: the file has another adapter, of which `Trainer` would only log.
    """
    in_model = model.state_dict(keep_vars=True)
    is_file = any(key.endswith("_block") for key in state.keys() - in_model.keys())
    view = ModelView(model)
    if prefix or not is_file or adapter not in view.adapters:
        return
    names = {id(tensor): name for name, tensor in collect_tensors(view, adapter).items()}
    # The file has a tied parameter once, and the model under several keys.
    keys = {key: names[id(value)] for key, value in in_model.items() if id(value) in names}
    given = {key: state[name] for key, name in keys.items() if name in state}
    given |= {name: state[name] for name in state.keys() - set(keys.values())}
    disha.load_adapter_state_dict(model, given, adapter)
    state.clear()


def is_complete(checkpoint: Path) -> bool:
    """Return whether a checkpoint has the trainer's state, which `Trainer` writes last."""
    try:
        TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    except (OSError, ValueError):
        return False
    return True


def _set_aside_incomplete(output: Path) -> None:
    """Rename the checkpoints that a run did not write to the end."""
    for folder in map(Path, sort_checkpoints(str(output))):
        if not is_complete(folder):
            aside = folder.with_name(f"incomplete-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
